/* See h2.h. From top to bottom: memory, streams, events, floods, headers in, bodies in, replies out, the connection. */
#include "h2.h"

#include <dlfcn.h>
#include <nghttp2/nghttp2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- bounds that are nobody's to configure ---- */

enum {
    PREFIX = 5,                        /* gRPC's compressed flag and message length */
    FIRST_BODY = 4096,                 /* bytes allocated for a body before more of it has come */
    LARGEST_FRAME = 16 * 1024,         /* of DATA that we send: libnghttp2 keeps a buffer for the largest there was */
    CONNECTION_WINDOW = 16 << 20,      /* streams are held back one by one; the connection as a whole is not */
    KEPT_OUTPUT = 64 * 1024,           /* a larger output buffer is given back once no more can go: idle peers are many */
    KEPT_EVENTS = 1024,
    PROGRESS = 16 * 1024,              /* bytes of a reply that a peer takes in h2_tick's time at least */
    CONTINUATIONS = 16,                /* frames of one header block */
    HEADERS_SLACK = 8,                 /* headers up to so many times the limit are answered, more are reset */
    HEADERS_PER_REQUEST = 256,
    SLICE = 16 * 1024,                 /* bytes between two looks whether we have had enough of the peer */
    SETTINGS_COST = 50                 /* idle frames that one SETTINGS counts for: each may touch every stream */
};

static const double LINGER_S = 1; /* for which a peer may send on after its answer */

static const uint64_t SHUT_PING = 0x6170706c69616e63; /* tells our own shut-down ping from a keepalive */

/* How often it goes round before the last stream is named. gRPC's C core writes the answer to a ping ahead of calls that
 * it had begun by then; they are surely here when the second answer is. */
enum { SHUT_ROUNDS = 2 };

/* ---- memory: every allocation of ours goes through here, so that a fuzzer can let one fail ---- */

#ifdef H2_FAULTS
bool h2_fault_now(void);
#else
#define h2_fault_now() false
#endif

static void *resized(void *block, size_t size)
{
    return h2_fault_now() ? NULL : realloc(block, size);
}

static void *zeroed(size_t size)
{
    return h2_fault_now() ? NULL : calloc(1, size);
}

typedef struct {
    uint8_t *data;
    size_t size, room;
} buffer;

/* Make room for `more` bytes; doubling, but never beyond `most` in all unless that is too little. */
static bool buffer_reserve(buffer *b, size_t more, size_t most)
{
    if (b->size + more <= b->room)
        return true;
    size_t room = b->room ? b->room * 2 : FIRST_BODY;
    if (room > most)
        room = most;
    if (room < b->size + more)
        room = b->size + more;
    uint8_t *data = resized(b->data, room);
    if (!data)
        return false;
    b->data = data;
    b->room = room;
    return true;
}

static bool buffer_add(buffer *b, const void *data, size_t size)
{
    if (!buffer_reserve(b, size, SIZE_MAX))
        return false;
    if (size)
        memcpy(b->data + b->size, data, size);
    b->size += size;
    return true;
}

static void buffer_free(buffer *b)
{
    free(b->data);
    *b = (buffer){0};
}

/* ---- what we know ---- */

/* A piece of output. Its bytes are borrowed from `owner` until it is on the spent list. */
typedef struct chunk {
    struct chunk *next;
    const uint8_t *data;
    void *owner;
    size_t size, sent; /* both count the prefix */
    uint8_t prefix_size;
    uint8_t prefix[PREFIX];
} chunk;

typedef struct stream {
    struct stream *prev, *next;
    int32_t id;
    bool grpc, heavy;
    bool announced;  /* its head was given away */
    bool asked;      /* H2_WANT was said about the message that is coming */
    bool admitted;   /* … and answered */
    bool deaf;       /* what still comes is dropped */
    bool lingers;    /* … for a moment: it has its answer */
    bool input_over;
    bool waiting;    /* in the list of streams to be announced at the end of a feed */
    struct stream *next_waiting;

    buffer head;
    size_t head_count;      /* as RFC 9113, 6.5.2 counts */
    uint32_t headers;
    int64_t timeout_us;

    uint8_t prefix[PREFIX];
    uint8_t prefix_size;
    size_t need;            /* bytes of the message that is coming */
    buffer body;

    uint64_t untaken;       /* bytes given away in messages, and not yet credited */

    bool answered;          /* response headers are submitted */
    bool finished;          /* nothing more will be queued */
    bool trailers;          /* gRPC trailers end it */
    bool deferred;          /* libnghttp2 waits for us to have data */
    bool tell_drained;
    size_t mark;
    chunk *first, *last;
    size_t queued;
    size_t moved;           /* bytes that the peer took since `since` */
    double since;           /* h2_tick's time: of the stream's begin, or of the peer's last progress with the queue */
    int status;
    char *message, *details, *timing;
    size_t message_size, details_size, timing_size;
} stream;

/* A bucket of tokens: `burst` at once, `rate` a second. */
typedef struct {
    double tokens, burst, rate, filled_at;
} bucket;

struct h2_conn {
    nghttp2_session *session;
    h2_limits limits;
    stream *streams, *waiting;
    size_t stream_count;
    buffer output;
    size_t output_limit, pending;
    chunk *spent;
    h2_event *events;
    size_t event_count, event_next, event_room;
    bucket resets, idle_frames;
    uint32_t continuations;
    double now, ticked_at;  /* the time that h2_tick knows of: seconds of this connection's life, and as it was told */
    bool shutting;
    int shut_rounds;
    bool ending, ended;     /* the peer is to hear that we had enough; it has */
    bool cannot_read, cannot_write; /* libnghttp2 failed midway: it must not be asked again */
    const char *fault;
    char *load;             /* what every call that succeeds says of us in its trailers */
    size_t load_size;
};

/* ---- streams ---- */

static stream *find(h2_conn *c, int32_t id)
{
    return nghttp2_session_get_stream_user_data(c->session, id);
}

static void spend(h2_conn *c, chunk *k)
{
    k->next = c->spent;
    c->spent = k;
}

static void drop_output(h2_conn *c, stream *s)
{
    while (s->first) {
        chunk *k = s->first;
        s->first = k->next;
        spend(c, k);
    }
    s->last = NULL;
    c->pending -= s->queued;
    s->queued = 0;
}

static void stream_free(h2_conn *c, stream *s)
{
    drop_output(c, s);
    for (stream **at = &c->waiting; s->waiting && *at; at = &(*at)->next_waiting)
        if (*at == s) {
            *at = s->next_waiting;
            break;
        }
    if (s->prev)
        s->prev->next = s->next;
    else
        c->streams = s->next;
    if (s->next)
        s->next->prev = s->prev;
    c->stream_count--;
    buffer_free(&s->head);
    buffer_free(&s->body);
    free(s->message);
    free(s->details);
    free(s->timing);
    free(s);
}

static void stop_listening(stream *s)
{
    s->deaf = true;
    buffer_free(&s->body);
}

/* ---- events ---- */

static h2_event *new_event(h2_conn *c, stream *s, uint32_t flags)
{
    if (c->event_count == c->event_room) {
        size_t room = c->event_room ? c->event_room * 2 : 16;
        h2_event *events = resized(c->events, room * sizeof *events);
        if (!events)
            return NULL;
        c->events = events;
        c->event_room = room;
    }
    h2_event *e = &c->events[c->event_count++];
    *e = (h2_event){.stream = s->id, .flags = flags, .timeout_us = -1};
    return e;
}

/* Say something about a stream; the first time its head goes along. */
static h2_event *say(h2_conn *c, stream *s, uint32_t flags)
{
    h2_event *e = new_event(c, s, flags | (s->grpc ? 0 : H2_HTTP));
    if (!e)
        return NULL;
    if (!s->announced) {
        s->announced = true;
        e->flags |= H2_HEAD;
        e->head = (char *)s->head.data;
        e->head_size = s->head.size;
        e->timeout_us = s->timeout_us;
        s->head = (buffer){0};
    }
    return e;
}

/* Give away the message, or piece of a body, that is complete. */
static bool say_message(h2_conn *c, stream *s, uint32_t flags)
{
    h2_event *e = say(c, s, flags | H2_MESSAGE | (s->grpc && s->prefix[0] ? H2_COMPRESSED : 0));
    if (!e)
        return false;
    e->body = s->body.data;
    e->body_size = s->body.size;
    s->untaken += s->body.size + (s->grpc ? PREFIX : 0);
    s->body = (buffer){0};
    s->prefix_size = 0;
    s->asked = s->admitted = false;
    return true;
}

/* Note why the connection cannot go on; the first reason is the true one. */
static void give_up_connection(h2_conn *c, int error)
{
    if (!c->fault)
        c->fault = nghttp2_strerror(error);
}

static void event_free(h2_event *e)
{
    free(e->head);
    free(e->body);
    e->head = NULL;
    e->body = NULL;
}

/* Let go of the events that were taken. */
static void forget_events(h2_conn *c)
{
    if (c->event_next)
        event_free(&c->events[c->event_next - 1]);
    c->event_count -= c->event_next;
    if (c->event_count)
        memmove(c->events, c->events + c->event_next, c->event_count * sizeof *c->events);
    c->event_next = 0;
    if (!c->event_count && c->event_room > KEPT_EVENTS) {
        free(c->events);
        c->events = NULL;
        c->event_room = 0;
    }
}

bool h2_has_events(const h2_conn *c)
{
    return c->event_next < c->event_count;
}

h2_event *h2_next(h2_conn *c)
{
    /* The one before was taken: a large body must not be here twice for as long as its call lasts. */
    if (c->event_next)
        event_free(&c->events[c->event_next - 1]);
    return c->event_next < c->event_count ? &c->events[c->event_next++] : NULL;
}

/* ---- floods ---- */

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static bool take_tokens(bucket *b, double count)
{
    if (b->tokens < count) {
        double now = seconds_now();
        double tokens = (now - b->filled_at) * b->rate;
        b->filled_at = now;
        b->tokens += tokens < b->burst ? tokens : b->burst;
    }
    if (b->tokens < count)
        return false;
    b->tokens -= count;
    return true;
}

static bool take_token(bucket *b)
{
    return take_tokens(b, 1);
}

/* Decide that the connection ends; h2_pull says so to the peer. Not here: libnghttp2 up to 1.68 runs into an assertion,
 * and takes the process with it, when it is told so by one of its callbacks and malformed frames follow
 * (CVE-2026-27135). */
static int calm_down(h2_conn *c, const char *fault)
{
    c->ending = true;
    if (!c->fault)
        c->fault = fault;
    return 0;
}

static const char NOTHING[] = "too many frames that carry nothing";

/* Frames that are cheap to send and cost us work are counted before they are parsed. libnghttp2 bounds what it must
 * answer and nobody reads; these bounds hold for peers that read as well. */
static int on_begin_frame(nghttp2_session *session, const nghttp2_frame_hd *head, void *context)
{
    (void)session;
    h2_conn *c = context;
    if (head->type == NGHTTP2_CONTINUATION)
        return ++c->continuations > CONTINUATIONS ? calm_down(c, "too many CONTINUATION frames") : 0;
    c->continuations = 0;
    bool empty_data = head->type == NGHTTP2_DATA && !head->length && !(head->flags & NGHTTP2_FLAG_END_STREAM);
    bool idle = empty_data || head->type == NGHTTP2_PING || head->type == NGHTTP2_PRIORITY ||
                head->type == NGHTTP2_SETTINGS;
    if (idle && !take_tokens(&c->idle_frames, head->type == NGHTTP2_SETTINGS ? SETTINGS_COST : 1))
        return calm_down(c, NOTHING);
    if (head->type == NGHTTP2_RST_STREAM && !take_token(&c->resets))
        return calm_down(c, "too many cancelled streams");
    return 0;
}

/* A stream that we reset for the peer's fault counts like one it reset itself: else it can have as many as it likes
 * started and thrown away (CVE-2025-8671, "MadeYouReset"). */
static int on_invalid_frame(nghttp2_session *session, const nghttp2_frame *frame, int error, void *context)
{
    (void)session, (void)frame, (void)error;
    h2_conn *c = context;
    return take_token(&c->resets) ? 0 : calm_down(c, "too many streams broken by invalid frames");
}

/* ---- headers in ---- */

static int on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *context)
{
    h2_conn *c = context;
    if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
        return 0;
    stream *s = zeroed(sizeof *s);
    if (!s)
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    s->id = frame->hd.stream_id;
    s->timeout_us = -1;
    s->since = c->now;
    s->next = c->streams;
    if (c->streams)
        c->streams->prev = s;
    c->streams = s;
    c->stream_count++;
    nghttp2_session_set_stream_user_data(session, s->id, s);
    return 0;
}

/* grpc-timeout: 1 to 8 digits and a unit. Source: grpc/grpc doc/PROTOCOL-HTTP2.md. */
static int64_t parse_timeout(const uint8_t *text, size_t size)
{
    if (size < 2 || size > 9)
        return -2;
    int64_t number = 0;
    for (size_t i = 0; i + 1 < size; i++) {
        if (text[i] < '0' || text[i] > '9')
            return -2;
        number = number * 10 + (text[i] - '0');
    }
    switch (text[size - 1]) {
    case 'H': return number * 3600 * 1000000;
    case 'M': return number * 60 * 1000000;
    case 'S': return number * 1000000;
    case 'm': return number * 1000;
    case 'u': return number;
    case 'n': return number / 1000;
    default: return -2;
    }
}

static bool is(const uint8_t *text, size_t size, const char *expected)
{
    return size == strlen(expected) && memcmp(text, expected, size) == 0;
}

/* gRPC, but not gRPC-Web: "application/grpc", then nothing, "+…" or ";…". */
static bool is_grpc(const uint8_t *value, size_t size)
{
    static const char type[] = "application/grpc";
    const size_t length = sizeof type - 1;
    return size >= length && memcmp(value, type, length) == 0 &&
           (size == length || value[length] == '+' || value[length] == ';');
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_size,
                     const uint8_t *value, size_t value_size, uint8_t flags, void *context)
{
    (void)flags;
    h2_conn *c = context;
    if (frame->hd.type != NGHTTP2_HEADERS)
        return 0;
    stream *s = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
    if (!s)
        return 0;
    s->head_count += name_size + value_size + 32;
    s->headers++;
    /* Headers are unpacked from a fraction of their size: somebody who means it gets no answer. */
    if (s->head_count > c->limits.max_headers * HEADERS_SLACK)
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    if (frame->headers.cat != NGHTTP2_HCAT_REQUEST)
        return 0; /* a request's trailers say nothing to us; libnghttp2 has checked them */
    if (s->head_count > c->limits.max_headers || s->headers > HEADERS_PER_REQUEST) {
        s->heavy = true;
        buffer_free(&s->head);
    }
    if (is(name, name_size, "content-type") && is_grpc(value, value_size))
        s->grpc = true;
    if (s->heavy)
        return 0;
    if (is(name, name_size, "grpc-timeout")) {
        /* Apart from the others: it differs from call to call, while the rest of the head rarely does. */
        s->timeout_us = parse_timeout(value, value_size);
        return 0;
    }
    if (!buffer_reserve(&s->head, name_size + value_size + 2, SIZE_MAX))
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    buffer_add(&s->head, name, name_size);
    buffer_add(&s->head, "", 1);
    buffer_add(&s->head, value, value_size);
    buffer_add(&s->head, "", 1);
    return 0;
}

static void wait_for_announcement(h2_conn *c, stream *s)
{
    if (s->waiting)
        return;
    s->waiting = true;
    s->next_waiting = c->waiting;
    c->waiting = s;
}

static int on_headers_complete(h2_conn *c, stream *s, bool end)
{
    s->input_over = end;
    if (s->heavy) {
        stop_listening(s);
        return say(c, s, H2_HEAVY) ? 0 : NGHTTP2_ERR_CALLBACK_FAILURE;
    }
    if (end)
        return say(c, s, H2_END) ? 0 : NGHTTP2_ERR_CALLBACK_FAILURE;
    wait_for_announcement(c, s);
    return 0;
}

/* ---- bodies in ---- */

/* Let the peer send what the stream may have: the rest of an admitted message, or so much that the first window is
 * full again. Small differences wait, so that not every message costs a frame. */
static int top_up(h2_conn *c, stream *s)
{
    if (s->deaf || s->input_over)
        return 0;
    /* As libnghttp2 counts: padding takes room, too, and comes back when it likes. */
    int32_t left = nghttp2_session_get_stream_local_window_size(c->session, s->id);
    uint64_t open = left > 0 ? (uint64_t)left : 0;
    uint64_t wanted = s->untaken < c->limits.window ? c->limits.window - s->untaken : 0;
    /* Not a byte more: with room for its prefix the next message would follow though nobody took this one. */
    if (s->admitted && s->need - s->body.size > wanted)
        wanted = s->need - s->body.size;
    if (wanted > NGHTTP2_MAX_WINDOW_SIZE)
        wanted = NGHTTP2_MAX_WINDOW_SIZE;
    if (wanted <= open || (!s->admitted && wanted - open < c->limits.window / 2))
        return 0;
    return nghttp2_submit_window_update(c->session, NGHTTP2_FLAG_NONE, s->id, (int32_t)(wanted - open));
}

static size_t big_endian(const uint8_t *four)
{
    return (size_t)four[0] << 24 | (size_t)four[1] << 16 | (size_t)four[2] << 8 | four[3];
}

/* Says that the stream can go no further; the caller of the connection answers it. */
static bool give_up(h2_conn *c, stream *s, uint32_t flags)
{
    stop_listening(s);
    h2_event *e = say(c, s, flags);
    if (!e)
        return false;
    e->size = s->need;
    return true;
}

static bool message_complete(const stream *s)
{
    return s->prefix_size == PREFIX && s->body.size == s->need;
}

/* Take the bytes of the five-byte prefix that are here. Returns how many were its. */
static size_t take_prefix(stream *s, const uint8_t *data, size_t size)
{
    size_t count = PREFIX - s->prefix_size;
    if (count > size)
        count = size;
    memcpy(s->prefix + s->prefix_size, data, count);
    s->prefix_size = (uint8_t)(s->prefix_size + count);
    if (s->prefix_size == PREFIX)
        s->need = big_endian(s->prefix + 1);
    return count;
}

static int take_grpc(h2_conn *c, stream *s, const uint8_t *data, size_t size)
{
    while (size) {
        /* A complete message waits for what follows: with the end of the stream it is one event. */
        if (message_complete(s) && !say_message(c, s, 0))
            return NGHTTP2_ERR_CALLBACK_FAILURE;
        if (s->prefix_size < PREFIX) {
            size_t count = take_prefix(s, data, size);
            data += count;
            size -= count;
            if (s->prefix_size < PREFIX)
                break;
            if (s->prefix[0] > 1)
                return give_up(c, s, H2_BROKEN) ? 0 : NGHTTP2_ERR_CALLBACK_FAILURE;
            if (s->need > c->limits.max_message)
                return give_up(c, s, H2_TOO_BIG) ? 0 : NGHTTP2_ERR_CALLBACK_FAILURE;
            continue;
        }
        size_t count = s->need - s->body.size;
        if (count > size)
            count = size;
        /* Admitted bytes are paid for: no doubling on the way. Others take as much as has come. */
        if (!buffer_reserve(&s->body, s->admitted ? s->need - s->body.size : count, s->need))
            return NGHTTP2_ERR_CALLBACK_FAILURE;
        memcpy(s->body.data + s->body.size, data, count);
        s->body.size += count;
        data += count;
        size -= count;
    }
    return 0;
}

static int on_data_chunk(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data, size_t size,
                         void *context)
{
    (void)flags;
    h2_conn *c = context;
    int failed = nghttp2_session_consume_connection(session, size);
    if (failed)
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    stream *s = find(c, id);
    if (!s || s->deaf)
        return 0;
    wait_for_announcement(c, s);
    if (s->grpc)
        return take_grpc(c, s, data, size);
    return buffer_add(&s->body, data, size) ? 0 : NGHTTP2_ERR_CALLBACK_FAILURE;
}

static bool end_input(h2_conn *c, stream *s)
{
    s->input_over = true;
    if (s->deaf)
        return true;
    if (!s->grpc)
        return s->body.size ? say_message(c, s, H2_END) : say(c, s, H2_END) != NULL;
    if (message_complete(s))
        return say_message(c, s, H2_END);
    if (s->prefix_size)
        return give_up(c, s, H2_BROKEN);
    return say(c, s, H2_END) != NULL;
}

/* Padding takes room in the window, and comes with as little as nothing. */
static int on_padding(h2_conn *c, const nghttp2_frame *frame)
{
    if (frame->data.padlen == frame->hd.length && !(frame->hd.flags & NGHTTP2_FLAG_END_STREAM) &&
        !take_token(&c->idle_frames))
        return calm_down(c, NOTHING);
    stream *s = find(c, frame->hd.stream_id);
    return s ? top_up(c, s) : 0;
}

static int begin_shut_round(h2_conn *c)
{
    return nghttp2_submit_ping(c->session, NGHTTP2_FLAG_NONE, (const uint8_t *)&SHUT_PING);
}

static int end_shut_round(h2_conn *c)
{
    c->shut_rounds++;
    if (!h2_retired(c))
        return begin_shut_round(c);
    return nghttp2_submit_goaway(c->session, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(c->session),
                                 NGHTTP2_NO_ERROR, NULL, 0);
}

static int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *context)
{
    h2_conn *c = context;
    uint8_t type = frame->hd.type;
    if (type == NGHTTP2_DATA && frame->data.padlen && on_padding(c, frame))
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    if (type == NGHTTP2_PING && frame->hd.flags & NGHTTP2_FLAG_ACK && c->shutting && !h2_retired(c) &&
        memcmp(frame->ping.opaque_data, &SHUT_PING, sizeof SHUT_PING) == 0)
        return end_shut_round(c);
    if (type != NGHTTP2_DATA && type != NGHTTP2_HEADERS)
        return 0;
    stream *s = find(c, frame->hd.stream_id);
    if (!s)
        return 0;
    bool end = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
    if (type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST)
        return on_headers_complete(c, s, end);
    return !end || end_input(c, s) ? 0 : NGHTTP2_ERR_CALLBACK_FAILURE;
}

/* What has begun and is not complete when the bytes at hand are used up is told now: the head, so that the caller can
 * be turned away, and how much memory the message will need. */
static bool announce(h2_conn *c)
{
    while (c->waiting) {
        stream *s = c->waiting;
        c->waiting = s->next_waiting;
        s->waiting = false;
        if (s->deaf || s->input_over)
            continue;
        if (s->grpc ? message_complete(s) : s->body.size) {
            if (!say_message(c, s, 0))
                return false;
            continue;
        }
        bool wants = s->grpc && s->prefix_size == PREFIX && !s->asked;
        if (!wants && s->announced)
            continue;
        h2_event *e = say(c, s, wants ? H2_WANT : 0);
        if (!e)
            return false;
        if (wants) {
            s->asked = true;
            e->size = s->need;
        }
    }
    return true;
}

int h2_admit(h2_conn *c, int32_t id)
{
    stream *s = find(c, id);
    if (!s || s->deaf || !s->asked)
        return 1;
    s->admitted = true;
    return top_up(c, s);
}

int h2_credit(h2_conn *c, int32_t id, size_t taken)
{
    stream *s = find(c, id);
    if (!s)
        return 1;
    if (s->grpc)
        taken += PREFIX;
    s->untaken -= taken < s->untaken ? taken : s->untaken;
    return top_up(c, s);
}

static int on_frame_sent(nghttp2_session *session, const nghttp2_frame *frame, void *context)
{
    h2_conn *c = context;
    /* The ping must come after the notice, and libnghttp2 sends pings first: were the answer on its way before the
     * client has read the notice, a stream could be between them. */
    if (frame->hd.type == NGHTTP2_GOAWAY && c->shutting && frame->goaway.last_stream_id == INT32_MAX)
        return begin_shut_round(c);
    if (frame->hd.type == NGHTTP2_GOAWAY && frame->goaway.error_code != NGHTTP2_NO_ERROR && !c->fault)
        c->fault = nghttp2_http2_strerror(frame->goaway.error_code);
    bool ends = (frame->hd.type == NGHTTP2_HEADERS || frame->hd.type == NGHTTP2_DATA) &&
                frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
    stream *s = ends ? find(c, frame->hd.stream_id) : NULL;
    if (!s || s->input_over)
        return 0;
    /* Answered before everything was read: the peer is told to keep the rest (RFC 9113, 8.1). Some clients forget the
     * answer over it (curl 7.88, and grpc-js the trailers behind a message); so they first get a moment to end by
     * themselves, if all they can still send is a window of what we drop. */
    stop_listening(s);
    bool only_trailers = s->grpc && frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_RESPONSE;
    if (only_trailers || nghttp2_session_get_stream_local_window_size(session, s->id) > (int32_t)c->limits.window)
        return nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, s->id, NGHTTP2_NO_ERROR);
    s->lingers = true;
    s->since = c->now;
    return 0;
}

/* Headers that libnghttp2 will not send, for one because they are larger than 64 kB, must not leave a call without an
 * end. */
static int on_frame_not_sent(nghttp2_session *session, const nghttp2_frame *frame, int error, void *context)
{
    (void)error;
    stream *s = frame->hd.type == NGHTTP2_HEADERS ? find(context, frame->hd.stream_id) : NULL;
    return s ? nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, s->id, NGHTTP2_INTERNAL_ERROR) : 0;
}

static int on_stream_close(nghttp2_session *session, int32_t id, uint32_t code, void *context)
{
    h2_conn *c = context;
    stream *s = find(c, id);
    if (!s)
        return 0;
    nghttp2_session_set_stream_user_data(session, id, NULL);
    bool told = !s->announced || (s->finished && code == NGHTTP2_NO_ERROR) || say(c, s, H2_RESET);
    /* libnghttp2 resets a stream by itself for window overflow and bad bodies: on_invalid_frame is not asked then. */
    bool calm = code == NGHTTP2_NO_ERROR || code == NGHTTP2_CANCEL || code == NGHTTP2_REFUSED_STREAM;
    stream_free(c, s);
    if (!told)
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    return calm || take_token(&c->resets) ? 0 : calm_down(c, "too many broken streams");
}

/* ---- replies out ---- */

#define HEADER(name, value, size, flags) {(uint8_t *)(name), (uint8_t *)(value), sizeof(name) - 1, (size), (flags)}
enum { BORROWED = NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE };

enum { MOST_TRAILERS = 5 };

/* The trailers of a gRPC stream. Returns their number. `digits` has room for a status. */
static size_t grpc_trailers(const h2_conn *c, const stream *s, nghttp2_nv *out, char digits[16])
{
    int length = snprintf(digits, 16, "%d", s->status);
    size_t count = 0;
    out[count++] = (nghttp2_nv)HEADER("grpc-status", digits, (size_t)length, NGHTTP2_NV_FLAG_NO_COPY_NAME);
    if (s->message_size)
        out[count++] =
            (nghttp2_nv)HEADER("grpc-message", s->message, s->message_size, NGHTTP2_NV_FLAG_NO_COPY_NAME);
    if (s->details_size)
        out[count++] =
            (nghttp2_nv)HEADER("grpc-status-details-bin", s->details, s->details_size, NGHTTP2_NV_FLAG_NO_COPY_NAME);
    if (!s->status && c->load_size)
        out[count++] =
            (nghttp2_nv)HEADER("endpoint-load-metrics-bin", c->load, c->load_size, NGHTTP2_NV_FLAG_NO_COPY_NAME);
    if (s->timing_size)
        out[count++] =
            (nghttp2_nv)HEADER("x-appliance-timing", s->timing, s->timing_size, NGHTTP2_NV_FLAG_NO_COPY_NAME);
    return count;
}

static int submit_trailers(nghttp2_session *session, const h2_conn *c, stream *s)
{
    nghttp2_nv trailers[MOST_TRAILERS];
    char digits[16];
    return nghttp2_submit_trailer(session, s->id, trailers, grpc_trailers(c, s, trailers, digits));
}

/* libnghttp2 asks how much of a stream may go into the next DATA frame; the bytes are fetched by send_data. */
static ssize_t read_output(nghttp2_session *session, int32_t id, uint8_t *into, size_t room, uint32_t *flags,
                           nghttp2_data_source *source, void *context)
{
    (void)into, (void)id;
    stream *s = source->ptr;
    if (!s->queued && !s->finished) {
        s->deferred = true;
        return NGHTTP2_ERR_DEFERRED;
    }
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    size_t count = s->queued < room ? s->queued : room;
    if (count == s->queued && s->finished) {
        *flags |= NGHTTP2_DATA_FLAG_EOF;
        if (s->trailers) {
            *flags |= NGHTTP2_DATA_FLAG_NO_END_STREAM;
            if (submit_trailers(session, context, s))
                return NGHTTP2_ERR_CALLBACK_FAILURE;
        }
    }
    return (ssize_t)count;
}

/* Copy `count` bytes from the front of a chunk: its prefix first. */
static void copy_from(chunk *k, buffer *out, size_t count)
{
    if (k->sent < k->prefix_size) {
        size_t part = k->prefix_size - k->sent;
        if (part > count)
            part = count;
        memcpy(out->data + out->size, k->prefix + k->sent, part);
        out->size += part;
        k->sent += part;
        count -= part;
    }
    if (count) {
        memcpy(out->data + out->size, k->data + (k->sent - k->prefix_size), count);
        out->size += count;
        k->sent += count;
    }
}

static int send_data(nghttp2_session *session, nghttp2_frame *frame, const uint8_t *frame_head, size_t size,
                     nghttp2_data_source *source, void *context)
{
    (void)session, (void)frame;
    enum { FRAME_HEAD = 9 };
    h2_conn *c = context;
    stream *s = source->ptr;
    if (c->output.size >= c->output_limit)
        return NGHTTP2_ERR_WOULDBLOCK;
    if (!buffer_reserve(&c->output, FRAME_HEAD + size, SIZE_MAX))
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    buffer_add(&c->output, frame_head, FRAME_HEAD);
    s->queued -= size;
    c->pending -= size;
    s->moved += size;
    if (s->moved >= PROGRESS)
        s->since = c->now, s->moved = 0;
    while (size) {
        chunk *k = s->first;
        size_t count = k->size - k->sent < size ? k->size - k->sent : size;
        copy_from(k, &c->output, count);
        size -= count;
        if (k->sent == k->size) {
            s->first = k->next;
            if (!s->first)
                s->last = NULL;
            spend(c, k);
        }
    }
    if (s->tell_drained && s->queued <= s->mark) {
        s->tell_drained = false;
        return say(c, s, H2_DRAINED) ? 0 : NGHTTP2_ERR_CALLBACK_FAILURE;
    }
    return 0;
}

static ssize_t frame_size(nghttp2_session *session, uint8_t type, int32_t id, int32_t connection_window,
                          int32_t stream_window, uint32_t largest, void *context)
{
    (void)session, (void)type, (void)id, (void)context;
    int32_t size = connection_window < stream_window ? connection_window : stream_window;
    if ((uint32_t)size > largest)
        size = (int32_t)largest;
    return size > LARGEST_FRAME ? LARGEST_FRAME : size;
}

/* Put a chunk at the end of a stream's queue. */
static void enqueue(h2_conn *c, stream *s, chunk *k, const uint8_t *data, size_t size, bool framed, bool compressed)
{
    k->data = data;
    k->sent = 0;
    k->next = NULL;
    k->prefix_size = framed ? PREFIX : 0;
    k->prefix[0] = compressed;
    k->prefix[1] = (uint8_t)(size >> 24);
    k->prefix[2] = (uint8_t)(size >> 16);
    k->prefix[3] = (uint8_t)(size >> 8);
    k->prefix[4] = (uint8_t)size;
    k->size = size + k->prefix_size;
    if (s->last)
        s->last->next = k;
    else
        s->first = k;
    s->last = k;
    if (!s->queued)
        s->since = c->now, s->moved = 0;
    s->queued += k->size;
    c->pending += k->size;
}

/* Begin the response, or wake it up. */
static int go_on(h2_conn *c, stream *s, const nghttp2_nv *headers, size_t count)
{
    if (s->answered) {
        if (!s->deferred)
            return 0;
        s->deferred = false;
        return nghttp2_session_resume_data(c->session, s->id);
    }
    s->answered = true;
    nghttp2_data_provider provider = {.source = {.ptr = s}, .read_callback = read_output};
    return nghttp2_submit_response(c->session, s->id, headers, count, &provider);
}

static int go_on_grpc(h2_conn *c, stream *s, bool compressed)
{
    static const nghttp2_nv headers[] = {
        HEADER(":status", "200", 3, BORROWED),
        HEADER("content-type", "application/grpc", 16, BORROWED),
        HEADER("grpc-accept-encoding", "identity,gzip", 13, BORROWED),
        HEADER("grpc-encoding", "gzip", 4, BORROWED),
    };
    return go_on(c, s, headers, compressed ? 4 : 3);
}

/* From here on the owner comes back through the spent list, whatever becomes of the bytes. */
static chunk *chunk_for(void *owner)
{
    chunk *k = zeroed(sizeof *k);
    if (k)
        k->owner = owner;
    return k;
}

static int send_message(h2_conn *c, int32_t id, const uint8_t *data, size_t size, bool compressed, void *owner,
                        bool last)
{
    chunk *k = chunk_for(owner);
    if (!k)
        return H2_NOT_TAKEN;
    stream *s = find(c, id);
    if (!s || s->finished || !s->grpc) {
        spend(c, k);
        return 1;
    }
    enqueue(c, s, k, data, size, true, compressed);
    if (last) {
        s->finished = s->trailers = true;
        s->status = 0;
    }
    return go_on_grpc(c, s, compressed);
}

int h2_push(h2_conn *c, int32_t id, const uint8_t *data, size_t size, bool compressed, void *owner)
{
    return send_message(c, id, data, size, compressed, owner, false);
}

int h2_reply(h2_conn *c, int32_t id, const uint8_t *data, size_t size, bool compressed, void *owner)
{
    return send_message(c, id, data, size, compressed, owner, true);
}

static bool copied(char **into, size_t *into_size, const char *text, size_t size)
{
    free(*into); /* of an attempt that ran out of memory */
    *into = NULL;
    *into_size = 0;
    if (!size)
        return true;
    *into = resized(NULL, size);
    if (!*into)
        return false;
    memcpy(*into, text, size);
    *into_size = size;
    return true;
}

int h2_time(h2_conn *c, int32_t id, const char *timing, size_t size)
{
    stream *s = find(c, id);
    if (!s || s->finished || !s->grpc)
        return 1;
    return copied(&s->timing, &s->timing_size, timing, size) ? 0 : NGHTTP2_ERR_NOMEM;
}

int h2_finish(h2_conn *c, int32_t id, int status, const char *message, size_t message_size, const char *details,
              size_t details_size)
{
    stream *s = find(c, id);
    if (!s || s->finished || !s->grpc)
        return 1;
    if (!copied(&s->message, &s->message_size, message, message_size) ||
        !copied(&s->details, &s->details_size, details, details_size))
        return NGHTTP2_ERR_NOMEM;
    s->status = status;
    s->finished = s->trailers = true;
    if (s->answered)
        return go_on_grpc(c, s, false);
    s->answered = true;
    nghttp2_nv headers[3 + MOST_TRAILERS] = {
        HEADER(":status", "200", 3, BORROWED),
        HEADER("content-type", "application/grpc", 16, BORROWED),
        HEADER("grpc-accept-encoding", "identity,gzip", 13, BORROWED),
    };
    char digits[16];
    size_t count = 3 + grpc_trailers(c, s, headers + 3, digits);
    return nghttp2_submit_response(c->session, id, headers, count, NULL);
}

int h2_load(h2_conn *c, const char *report, size_t size)
{
    return copied(&c->load, &c->load_size, report, size) ? 0 : NGHTTP2_ERR_NOMEM;
}

int h2_respond(h2_conn *c, int32_t id, int status, const h2_header *headers, size_t count, bool last)
{
    stream *s = find(c, id);
    if (!s || s->answered || s->grpc || count > HEADERS_PER_REQUEST)
        return 1;
    nghttp2_nv *all = resized(NULL, (count + 1) * sizeof *all);
    if (!all)
        return NGHTTP2_ERR_NOMEM;
    char digits[16];
    int length = snprintf(digits, sizeof digits, "%d", status);
    all[0] = (nghttp2_nv)HEADER(":status", digits, (size_t)length, NGHTTP2_NV_FLAG_NO_COPY_NAME);
    for (size_t i = 0; i < count; i++)
        all[i + 1] = (nghttp2_nv){(uint8_t *)headers[i].name, (uint8_t *)headers[i].value, headers[i].name_size,
                                  headers[i].value_size, NGHTTP2_NV_FLAG_NONE};
    int result;
    if (last) {
        s->answered = s->finished = true;
        result = nghttp2_submit_response(c->session, id, all, count + 1, NULL);
    } else {
        result = go_on(c, s, all, count + 1);
    }
    free(all);
    return result;
}

int h2_data(h2_conn *c, int32_t id, const uint8_t *data, size_t size, bool last, void *owner)
{
    chunk *k = chunk_for(owner);
    if (!k)
        return H2_NOT_TAKEN;
    stream *s = find(c, id);
    if (!s || s->finished || !s->answered || s->grpc) {
        spend(c, k);
        return 1;
    }
    if (size)
        enqueue(c, s, k, data, size, false, false);
    else
        spend(c, k);
    s->finished = last;
    return go_on(c, s, NULL, 0);
}

int h2_reset(h2_conn *c, int32_t id, uint32_t code)
{
    stream *s = find(c, id);
    if (!s)
        return 1;
    stop_listening(s);
    s->finished = true;
    return nghttp2_submit_rst_stream(c->session, NGHTTP2_FLAG_NONE, id, code);
}

size_t h2_queued(h2_conn *c, int32_t id, size_t mark)
{
    stream *s = find(c, id);
    if (!s)
        return 0;
    s->mark = mark;
    s->tell_drained = s->queued > mark;
    return s->queued;
}

size_t h2_pull(h2_conn *c, size_t limit, const uint8_t **bytes)
{
    c->output.size = 0;
    c->output_limit = limit;
    while (c->output.size < limit && !c->cannot_write) {
        if (c->ending && !c->ended) {
            c->ended = true;
            nghttp2_session_terminate_session(c->session, NGHTTP2_ENHANCE_YOUR_CALM);
        }
        const uint8_t *frame;
        ssize_t size = nghttp2_session_mem_send(c->session, &frame);
        if (!size)
            break;
        int failed = size < 0 ? (int)size : buffer_add(&c->output, frame, (size_t)size) ? 0 : NGHTTP2_ERR_NOMEM;
        if (failed) {
            c->cannot_write = true; /* what is lost in the middle cannot be said later */
            give_up_connection(c, failed);
        }
    }
    *bytes = c->output.data;
    return c->output.size;
}

void h2_collect(h2_conn *c, h2_drop drop)
{
    if (c->output.room > KEPT_OUTPUT && c->output.size < c->output_limit)
        buffer_free(&c->output);
    while (c->spent) {
        chunk *k = c->spent;
        c->spent = k->next;
        if (k->owner)
            drop(k->owner);
        free(k);
    }
}

/* ---- the connection ---- */

static void set_callbacks(nghttp2_session_callbacks *callbacks)
{
    nghttp2_session_callbacks_set_on_begin_frame_callback(callbacks, on_begin_frame);
    nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data_chunk);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
    nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_frame_sent);
    nghttp2_session_callbacks_set_on_frame_not_send_callback(callbacks, on_frame_not_sent);
    nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(callbacks, on_invalid_frame);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_stream_close);
    nghttp2_session_callbacks_set_send_data_callback(callbacks, send_data);
    nghttp2_session_callbacks_set_data_source_read_length_callback(callbacks, frame_size);
}

/* The system's library may be older than the headers of these options: they are looked up, not linked. A library that
 * is compiled in is asked directly, as it exports no names. */
static void set_options(nghttp2_option *option)
{
    nghttp2_option_set_no_closed_streams(option, 1);
    nghttp2_option_set_no_auto_window_update(option, 1);
    /* grpcio sends metadata as it was given, and "Key " is an empty key, not a broken stream. */
    nghttp2_option_set_no_rfc9113_leading_and_trailing_ws_validation(option, 1);
#ifdef H2_STATIC_NGHTTP2
    nghttp2_option_set_stream_reset_rate_limit(option, 1000, 100);
    nghttp2_option_set_max_continuations(option, CONTINUATIONS);
#else
    void (*resets)(nghttp2_option *, uint64_t, uint64_t);
    void (*continuations)(nghttp2_option *, size_t);
    *(void **)&resets = dlsym(RTLD_DEFAULT, "nghttp2_option_set_stream_reset_rate_limit");
    *(void **)&continuations = dlsym(RTLD_DEFAULT, "nghttp2_option_set_max_continuations");
    if (resets)
        resets(option, 1000, 100);
    if (continuations)
        continuations(option, CONTINUATIONS);
#endif
}

static bool open_session(h2_conn *c)
{
    nghttp2_session_callbacks *callbacks = NULL;
    nghttp2_option *option = NULL;
    bool made = !nghttp2_session_callbacks_new(&callbacks) && !nghttp2_option_new(&option);
    if (made) {
        set_callbacks(callbacks);
        set_options(option);
        made = !nghttp2_session_server_new2(&c->session, callbacks, c, option);
    }
    nghttp2_session_callbacks_del(callbacks);
    nghttp2_option_del(option);
    if (!made)
        return false;
    enum { NO_RFC7540_PRIORITIES = 9 };
    nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, c->limits.max_streams},
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, c->limits.window},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, (uint32_t)c->limits.max_headers},
        {NO_RFC7540_PRIORITIES, 1},
    };
    return !nghttp2_submit_settings(c->session, NGHTTP2_FLAG_NONE, settings, 4) &&
           !nghttp2_session_set_local_window_size(c->session, NGHTTP2_FLAG_NONE, 0, CONNECTION_WINDOW);
}

h2_conn *h2_new(const h2_limits *limits)
{
    h2_conn *c = zeroed(sizeof *c);
    if (!c)
        return NULL;
    c->limits = *limits;
    double now = c->ticked_at = seconds_now();
    c->resets = (bucket){.tokens = 1000, .burst = 1000, .rate = 100, .filled_at = now};
    c->idle_frames = (bucket){.tokens = 10000, .burst = 10000, .rate = 1000, .filled_at = now};
    if (!open_session(c)) {
        h2_free(c, NULL);
        return NULL;
    }
    return c;
}

void h2_free(h2_conn *c, h2_drop drop)
{
    if (!c)
        return;
    nghttp2_session_del(c->session); /* tells nobody: the streams are still ours */
    while (c->streams)
        stream_free(c, c->streams);
    h2_collect(c, drop);
    while (h2_next(c))
        ;
    free(c->events);
    buffer_free(&c->output);
    free(c->load);
    free(c);
}

int h2_feed(h2_conn *c, const uint8_t *data, size_t size)
{
    forget_events(c);
    if (c->cannot_read)
        return NGHTTP2_ERR_INVALID_STATE;
    int failed = 0;
    while (size && !failed && !c->ending) {
        size_t slice = size < SLICE ? size : SLICE;
        ssize_t taken = nghttp2_session_mem_recv(c->session, data, slice);
        failed = taken < 0 ? (int)taken : 0;
        data += slice;
        size -= slice;
    }
    if (!failed && !announce(c))
        failed = NGHTTP2_ERR_NOMEM;
    if (failed) {
        c->cannot_read = true;
        give_up_connection(c, failed);
    }
    return failed;
}

int h2_shut(h2_conn *c)
{
    if (c->shutting)
        return 0;
    c->shutting = true;
    return nghttp2_submit_shutdown_notice(c->session);
}

int h2_abandon(h2_conn *c, uint32_t code)
{
    return nghttp2_session_terminate_session(c->session, code);
}

int h2_ping(h2_conn *c)
{
    return nghttp2_submit_ping(c->session, NGHTTP2_FLAG_NONE, NULL);
}

void h2_tick(h2_conn *c, double now, double patience)
{
    /* Who ticks late was busy, and heard nobody meanwhile: that is not the peer's delay. */
    double passed = now - c->ticked_at, most = patience / 4;
    c->ticked_at = now;
    c->now += passed < most ? passed : most;
    for (stream *s = c->streams; s; s = s->next) {
        if (s->lingers && c->now - s->since > LINGER_S) {
            s->since = c->now;
            h2_reset(c, s->id, NGHTTP2_NO_ERROR);
            continue;
        }
        bool unread = s->queued > 0, unheard = !s->announced && !s->waiting;
        if ((!unread && !unheard) || c->now - s->since <= patience)
            continue;
        if (unheard) { /* nothing else can come before its headers are complete */
            calm_down(c, "the headers of a request did not arrive in time");
            return;
        }
        s->since = c->now;
        h2_reset(c, s->id, NGHTTP2_CANCEL);
    }
}

bool h2_alive(const h2_conn *c)
{
    return !c->fault && (nghttp2_session_want_read(c->session) || nghttp2_session_want_write(c->session));
}

bool h2_retired(const h2_conn *c)
{
    return c->shut_rounds == SHUT_ROUNDS;
}

size_t h2_pending(const h2_conn *c)
{
    return c->pending;
}

size_t h2_streams(const h2_conn *c)
{
    return c->stream_count;
}

const char *h2_fault(const h2_conn *c)
{
    return c->fault;
}

const char *h2_library(void)
{
    return nghttp2_version(0)->version_str;
}
