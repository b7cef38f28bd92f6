/* A libFuzzer target for appliance/wire/native/h2.c: see `make fuzz`.
 *
 * The input is a program: a byte that chooses limits, then operations. Those of the peer put bytes on the wire, raw or
 * framed; those of the owner call h2.h as h2.py does, and as it does not. One operation lets an allocation of ours
 * fail; those of libnghttp2 are left alone, because 1.52 frees an item twice when it runs out of memory. Besides what
 * the sanitizers see, these laws are checked, and a broken one aborts:
 *
 *   - every owner that was taken is handed back exactly once, and its bytes are not touched afterwards;
 *   - a stream's first event has its head; nothing follows its reset; its end is said once; messages are as long as
 *     announced, and never longer than allowed;
 *   - what is pulled are whole frames; nothing but a reset follows a stream's end; the DATA of a stream is what was
 *     queued for it, in order, byte for byte;
 *   - what waits is counted right, and nothing waits once all streams are over;
 *   - unless an allocation failed, no call fails on a connection that is alive.
 */
#include "h2.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAW(condition)                                                         \
    do {                                                                       \
        if (!(condition)) {                                                    \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                           \
        }                                                                      \
    } while (0)

enum { STREAMS = 32, WIRE = 1 << 20, LARGEST_REPLY = 200 * 1000, PULL = 64 * 1024 };

/* ---- the program, as far as it was read ---- */

typedef struct {
    const uint8_t *at, *end;
} program;

static uint8_t byte(program *p)
{
    return p->at < p->end ? *p->at++ : 0;
}

static uint32_t word(program *p)
{
    uint32_t high = byte(p);
    return high << 8 | byte(p);
}

/* ---- allocations that fail ---- */

static int fault_in;  /* the how-many-th allocation from now fails; 0: none does */
static bool faulted;  /* one did */

bool h2_fault_now(void)
{
    if (fault_in && --fault_in == 0) {
        faulted = true;
        return true;
    }
    return false;
}

/* ---- what we expect of each stream ---- */

typedef struct {
    bool seen, ended, reset;       /* events */
    bool closed_out, headers_out;  /* output */
    uint64_t want;
    uint8_t *expected;             /* DATA still to come */
    size_t size, room;
} expectation;

typedef struct {
    h2_conn *conn;
    h2_limits limits;
    expectation streams[STREAMS];
    uint8_t *wire;     /* bytes on their way to the connection */
    size_t wire_size;
    uint8_t *output;   /* the beginning of a frame that is not pulled yet */
    size_t output_size;
    bool greeted;      /* the wire began as HTTP/2 should */
    double now;
} world;

static size_t owners;  /* taken, and not handed back */

static int32_t id_of(uint8_t choice)
{
    return 1 + 2 * (choice % STREAMS);
}

static expectation *of(world *w, int32_t id)
{
    return id > 0 && id % 2 && id / 2 < STREAMS ? &w->streams[id / 2] : NULL;
}

static void *sure(void *block)
{
    LAW(block);
    return block;
}

static void expect(expectation *x, const void *data, size_t size)
{
    if (x->size + size > x->room) {
        x->room = 2 * (x->size + size);
        x->expected = sure(realloc(x->expected, x->room));
    }
    if (size)
        memcpy(x->expected + x->size, data, size);
    x->size += size;
}

static void hand_back(void *owner)
{
    LAW(owners);
    owners--;
    free(owner);
}

/* ---- events ---- */

static void check_events(world *w)
{
    for (h2_event *e; (e = h2_next(w->conn));) {
        expectation *x = of(w, e->stream);
        if (!x)
            continue; /* raw bytes may open any stream */
        LAW(!x->reset);
        LAW(!x->seen == !!(e->flags & H2_HEAD));
        x->seen = true;
        if (e->flags & H2_HEAD)
            LAW(e->head_size <= w->limits.max_headers);
        else
            LAW(!e->head_size);
        if (e->flags & H2_END) {
            LAW(!x->ended);
            x->ended = true;
        }
        if (e->flags & H2_WANT) {
            LAW(e->size <= w->limits.max_message && !(e->flags & H2_MESSAGE));
            x->want = e->size + 1;
        }
        if (e->flags & H2_TOO_BIG)
            LAW(e->size > w->limits.max_message);
        if (e->flags & H2_MESSAGE && !(e->flags & H2_HTTP)) {
            LAW(e->body_size <= w->limits.max_message);
            LAW(!x->want || e->body_size == x->want - 1);
            x->want = 0;
        }
        /* The sanitizer looks whether all of it is there. */
        volatile uint8_t sum;
        for (size_t i = 0; i < e->body_size; i += 1 + e->body_size / 64)
            sum = e->body[i];
        for (size_t i = 0; i < e->head_size; i++)
            sum = (uint8_t)e->head[i];
        (void)sum;
        if (e->flags & H2_RESET)
            x->reset = true;
    }
}

static void feed(world *w, size_t size, bool take)
{
    if (size > w->wire_size)
        size = w->wire_size;
    uint8_t *exact = sure(malloc(size + !size)); /* reading beyond it is an error that the sanitizer sees */
    memcpy(exact, w->wire, size);
    int failed = h2_feed(w->conn, exact, size);
    free(exact);
    if (failed)
        LAW(failed < 0 && h2_fault(w->conn) && !h2_alive(w->conn));
    w->wire_size -= size;
    memmove(w->wire, w->wire + size, w->wire_size);
    if (take)
        check_events(w);
}

/* ---- output ---- */

static void check_frame(world *w, uint8_t type, uint8_t flags, int32_t id, const uint8_t *data, size_t size)
{
    enum { DATA = 0, HEADERS = 1, RST_STREAM = 3, CONTINUATION = 9, END_STREAM = 1 };
    expectation *x = of(w, id);
    if (!x)
        return;
    if (type == DATA) {
        LAW(x->headers_out && !x->closed_out);
        LAW(size <= x->size);
        LAW(!size || memcmp(data, x->expected, size) == 0);
        x->size -= size;
        if (x->size)
            memmove(x->expected, x->expected + size, x->size);
    }
    if (type == HEADERS) {
        LAW(!x->closed_out);
        LAW(!x->headers_out || flags & END_STREAM);
        x->headers_out = true;
    }
    if (type <= HEADERS && flags & END_STREAM) {
        LAW(!x->size);
        x->closed_out = true;
    }
    if (type == RST_STREAM)
        x->closed_out = true;
}

static void pull(world *w, size_t limit)
{
    const uint8_t *bytes;
    size_t size = h2_pull(w->conn, limit, &bytes);
    LAW(size <= limit + 20 * 1024);
    w->output = sure(realloc(w->output, w->output_size + size + 1));
    if (size)
        memcpy(w->output + w->output_size, bytes, size);
    w->output_size += size;
    h2_collect(w->conn, hand_back);
    check_events(w);
    if (faulted && h2_fault(w->conn))
        return; /* what was being written when memory ran out is not whole */
    uint8_t *at = w->output;
    while (w->output_size >= 9) {
        size_t length = (size_t)at[0] << 16 | (size_t)at[1] << 8 | at[2];
        if (w->output_size < 9 + length)
            break;
        int32_t id = (int32_t)((at[5] & 127u) << 24 | (uint32_t)at[6] << 16 | (uint32_t)at[7] << 8 | at[8]);
        check_frame(w, at[3], at[4], id, at + 9, length);
        at += 9 + length;
        w->output_size -= 9 + length;
    }
    LAW(!w->output_size);
}

/* ---- what the owner does ---- */

static bool fine(world *w, int result)
{
    LAW(result <= 1);
    if (result < 0)
        LAW(faulted || !h2_alive(w->conn));
    return result == 0;
}

typedef int (*send_function)(h2_conn *, int32_t, const uint8_t *, size_t, bool, void *);

static void send_some(world *w, send_function send, bool framed, uint8_t choice, size_t size, bool flag)
{
    int32_t id = id_of(choice);
    uint8_t *data = sure(malloc(size + 1));
    memset(data, (int)(size ^ choice), size);
    owners++;
    int result = send(w->conn, id, data, size, flag, data);
    if (result == H2_NOT_TAKEN) {
        LAW(faulted);
        hand_back(data);
    } else {
        fine(w, result); /* the bytes are queued even if libnghttp2 then fails: the connection is over */
        if (result == 0) {
            uint8_t prefix[5] = {flag, (uint8_t)(size >> 24), (uint8_t)(size >> 16), (uint8_t)(size >> 8), (uint8_t)size};
            if (framed)
                expect(of(w, id), prefix, 5);
            expect(of(w, id), data, size);
        }
    }
    h2_collect(w->conn, hand_back);
}

static void respond(world *w, uint8_t choice, int status, size_t count, bool last)
{
    h2_header headers[8];
    for (size_t i = 0; i < 8; i++)
        headers[i] = (h2_header){(const uint8_t *)"x-name", (const uint8_t *)"some value", 6, 10};
    fine(w, h2_respond(w->conn, id_of(choice), status, headers, count % 8, last));
}

/* ---- what the peer does ---- */

static void put(world *w, const void *data, size_t size)
{
    if (w->wire_size + size > WIRE)
        return;
    if (size)
        memcpy(w->wire + w->wire_size, data, size);
    w->wire_size += size;
}

static void put_frame(world *w, uint8_t type, uint8_t flags, uint32_t id, const void *data, size_t size)
{
    uint8_t head[9] = {(uint8_t)(size >> 16), (uint8_t)(size >> 8), (uint8_t)size,     type, flags,
                       (uint8_t)(id >> 24),   (uint8_t)(id >> 16),  (uint8_t)(id >> 8), (uint8_t)id};
    put(w, head, 9);
    put(w, data, size);
}

static void put_raw(world *w, program *p, size_t size)
{
    size_t left = (size_t)(p->end - p->at);
    size = size < left ? size : left;
    put(w, p->at, size);
    p->at += size;
}

/* A literal header field without indexing, or with it. */
static size_t field(uint8_t *to, bool index, const char *name, const char *value)
{
    uint8_t *at = to;
    *at++ = index ? 0x40 : 0;
    *at++ = (uint8_t)strlen(name);
    at = (uint8_t *)stpcpy((char *)at, name);
    *at++ = (uint8_t)strlen(value);
    at = (uint8_t *)stpcpy((char *)at, value);
    return (size_t)(at - to);
}

static void put_request(world *w, uint8_t choice, uint8_t kind)
{
    enum { POST = 0x83, HTTP = 0x86, ROOT = 0x84, END_STREAM = 1, END_HEADERS = 4 };
    uint8_t block[16000];
    size_t size = 0;
    block[size++] = POST;
    block[size++] = HTTP;
    block[size++] = ROOT;
    size += field(block + size, true, ":authority", "here");
    if (!(kind & 2))
        size += field(block + size, kind & 64, "content-type", kind & 4 ? "application/grpc+proto" : "application/grpc");
    static const char *timeouts[] = {"15S", "1H", "99999999M", "20m", "3u", "8n", "x1", "123456789S"};
    if (kind & 8)
        size += field(block + size, false, "grpc-timeout", timeouts[choice >> 5]);
    if (kind & 16)
        size += field(block + size, false, "content-length", "10");
    if (kind & 32) {
        char value[120];
        memset(value, 'v', sizeof value - 1);
        value[sizeof value - 1] = 0;
        for (int i = 0; i < (kind & 128 ? 70 : 20); i++)
            size += field(block + size, false, "x-heavy", value);
    }
    put_frame(w, 1, (uint8_t)(END_HEADERS | (kind & END_STREAM)), (uint32_t)id_of(choice), block, size);
}

static void put_message(world *w, uint8_t choice, uint8_t flags, size_t declared, size_t size)
{
    uint8_t *data = sure(malloc(5 + size));
    memcpy(data, (uint8_t[]){flags >> 4 & 1, 0, (uint8_t)(declared >> 16), (uint8_t)(declared >> 8), (uint8_t)declared}, 5);
    memset(data + 5, 'm', size);
    put_frame(w, 0, flags & 1, (uint32_t)id_of(choice), data, 5 + size);
    free(data);
}

static void put_number(world *w, uint8_t type, uint32_t id, uint32_t number)
{
    uint8_t four[] = {(uint8_t)(number >> 24), (uint8_t)(number >> 16), (uint8_t)(number >> 8), (uint8_t)number};
    put_frame(w, type, 0, id, four, 4);
}

static void put_setting(world *w, uint8_t key, uint32_t value)
{
    uint8_t six[] = {0, key, (uint8_t)(value >> 24), (uint8_t)(value >> 16), (uint8_t)(value >> 8), (uint8_t)value};
    put_frame(w, 4, 0, 0, six, 6);
}

/* Frames that carry nothing, many of them. */
static void put_flood(world *w, uint8_t choice, uint8_t count)
{
    static const struct {
        uint8_t type, flags, size;
    } kinds[] = {{6, 0, 8}, {4, 0, 0}, {0, 0, 0}, {0, 8, 1}, {9, 0, 0}, {3, 0, 4}, {2, 0, 5}, {8, 0, 4}};
    for (size_t i = 0; i < (size_t)count * 8; i++) {
        bool all = (choice >> 2 & 7) < 2;
        put_frame(w, kinds[choice >> 2 & 7].type, kinds[choice >> 2 & 7].flags, all ? 0 : (uint32_t)id_of(choice >> 5),
                  "\0\0\0\1\0\0\0\0", kinds[choice >> 2 & 7].size);
    }
}

/* ---- one step ---- */

static void peer_step(world *w, program *p, uint8_t operation)
{
    uint8_t choice = byte(p);
    switch (operation) {
    case 0: put_raw(w, p, choice); break;
    case 1: {
        uint8_t type = byte(p), flags = byte(p), size = byte(p);
        uint8_t data[256] = {0};
        for (size_t i = 0; i < size && p->at < p->end; i++)
            data[i] = byte(p);
        put_frame(w, type % 12, flags, choice & 128 ? 0 : (uint32_t)id_of(choice), data, size);
        break;
    }
    case 2: put_request(w, choice, byte(p)); break;
    case 3: {
        uint8_t flags = byte(p);
        size_t declared = word(p), size = word(p) % 16000;
        put_message(w, choice, flags, flags & 2 ? size : flags & 4 ? declared * 16 : declared, size);
        break;
    }
    case 4: put_number(w, 8, choice & 128 ? 0 : (uint32_t)id_of(choice), word(p) << (choice & 64 ? 8 : 0)); break;
    case 5: put_setting(w, choice % 10, word(p) << (choice & 128 ? 12 : 0)); break;
    case 6: put_number(w, 3, (uint32_t)id_of(choice), byte(p) % 16); break;
    case 7: { /* a flood, or the acknowledgement of our SETTINGS or of our shut-down ping */
        if (choice & 2)
            put_flood(w, choice, byte(p));
        else if (choice & 1)
            put_frame(w, 4, 1, 0, "", 0);
        else
            put_frame(w, 6, 1, 0, "cnailppa", 8);
        break;
    }
    }
}

static void owner_step(world *w, program *p, uint8_t operation)
{
    uint8_t choice = byte(p);
    int32_t id = id_of(choice);
    switch (operation) {
    case 0: send_some(w, h2_reply, true, choice, word(p) * (choice & 64 ? 4 : 1) % LARGEST_REPLY, choice & 128); break;
    case 1: send_some(w, h2_push, true, choice, word(p) % LARGEST_REPLY, choice & 128); break;
    case 2: {
        static const char text[] = "a%20sentence";
        size_t size = byte(p) % sizeof text, details = byte(p) % sizeof text;
        if (choice & 64)
            fine(w, h2_time(w->conn, id, text, size));
        fine(w, h2_finish(w->conn, id, byte(p) % 17, text, size, text, details));
        break;
    }
    case 3: respond(w, choice, 100 + byte(p) * 2, byte(p), choice & 128); break;
    case 4: send_some(w, h2_data, false, choice, word(p) % LARGEST_REPLY, choice & 128); break;
    case 5: fine(w, h2_reset(w->conn, id, byte(p) % 16)); break;
    case 6: fine(w, h2_admit(w->conn, id)); break;
    case 7: fine(w, h2_credit(w->conn, id, word(p))); break;
    case 8: h2_queued(w->conn, id, word(p)); break;
    case 9: pull(w, choice & 1 ? PULL : word(p)); break;
    case 10: h2_collect(w->conn, hand_back); break;
    case 11:
        if (choice == 1)
            fine(w, h2_shut(w->conn));
        else if (choice == 2)
            fine(w, h2_abandon(w->conn, byte(p) % 16));
        else if (choice == 3)
            fine(w, h2_load(w->conn, "AAAA", byte(p) % 5));
        else
            fine(w, h2_ping(w->conn));
        break;
    case 12: fault_in = 1 + choice % 16; break;
    case 13: h2_tick(w->conn, w->now += choice, 60); break;
    case 14: feed(w, choice < 128 ? choice : SIZE_MAX, choice & 1); break;
    default:
        check_events(w);
        LAW(!h2_has_events(w->conn));
    }
}

static void finish(world *w)
{
    fault_in = 0;
    feed(w, w->wire_size / 2, true);
    for (int i = 0; i < 64 && (h2_pending(w->conn) || i < 2); i++)
        pull(w, PULL);
    feed(w, SIZE_MAX, false); /* the end may come with events that nobody took */
    if (!h2_streams(w->conn))
        LAW(!h2_pending(w->conn));
    h2_free(w->conn, hand_back);
    LAW(!owners);
    for (size_t i = 0; i < STREAMS; i++)
        free(w->streams[i].expected);
    free(w->wire);
    free(w->output);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    program p = {data, data + size};
    uint8_t choice = byte(&p);
    world w = {.limits = {.max_message = choice & 1 ? 1 << 20 : 60 * 1000,
                          .max_headers = 1024,
                          .max_streams = choice & 2 ? 4 : STREAMS,
                          .window = choice & 4 ? 300 : 65535}};
    faulted = false;
    fault_in = choice & 8 ? 1 + byte(&p) % 4 : 0;
    w.conn = h2_new(&w.limits);
    if (!w.conn) {
        LAW(faulted);
        return 0;
    }
    w.wire = sure(malloc(WIRE));
    w.now = 1e9;
    h2_tick(w.conn, w.now, 60);
    if (!(choice & 16)) {
        put(&w, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24);
        put_frame(&w, 4, 0, 0, "", 0);
    }
    while (p.at < p.end) {
        uint8_t operation = byte(&p);
        if (operation & 1) {
            peer_step(&w, &p, operation >> 1 & 7);
            if (!(operation & 128))
                feed(&w, SIZE_MAX, !(operation & 64));
        } else {
            owner_step(&w, &p, operation >> 1 & 15);
        }
    }
    finish(&w);
    return 0;
}
