/* One HTTP/2 connection of a server, without sockets and without Python: bytes in, events out; replies in, bytes out.
 *
 * libnghttp2 parses frames, unpacks headers, keeps stream states and windows. What it leaves to us is here: whole gRPC
 * messages are gathered, bodies are let in only after their owner was asked, output is built from borrowed buffers,
 * and everything that a peer can make grow has a bound.
 *
 * Threads: one connection is used by one thread at a time.
 */
#ifndef APPLIANCE_H2_H
#define APPLIANCE_H2_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct h2_conn h2_conn;

typedef struct {
    size_t max_message;      /* bytes of one gRPC message */
    size_t max_headers;      /* bytes of one request's headers: names, values and 32 each (RFC 9113, 6.5.2) */
    uint32_t max_streams;    /* calls at once */
    uint32_t window;         /* bytes of a body that may come before anybody was asked */
} h2_limits;

/* What an event says; several may come together. */
enum {
    H2_HEAD = 1,         /* the first event of a stream: `head` and `timeout_us` are set */
    H2_MESSAGE = 2,      /* a whole gRPC message, or a piece of an HTTP body, is in `body` */
    H2_END = 4,          /* the client has said everything */
    H2_RESET = 8,        /* the stream is over without a reply: cancelled, or the connection failed */
    H2_HTTP = 16,        /* not a gRPC stream */
    H2_WANT = 32,        /* a message of `size` bytes has begun and is not all here: h2_admit or h2_finish must follow */
    H2_TOO_BIG = 64,     /* a message announced more than max_message, in `size`; the stream reads no more */
    H2_COMPRESSED = 128, /* the message has gRPC's compressed flag */
    H2_BROKEN = 256,     /* the stream ended inside a message, or its framing is none; it reads no more */
    H2_HEAVY = 512,      /* the headers were larger than max_headers and are not kept; it reads no more */
    H2_DRAINED = 1024    /* what was queued for the stream went below the mark that h2_push told of */
};

typedef struct {
    int32_t stream;
    uint32_t flags;
    int64_t timeout_us;  /* grpc-timeout in microseconds; -1: none; -2: none that can be read */
    uint64_t size;
    /* "name\0value\0…" in the order of arrival, without grpc-timeout. Owned by the event. */
    char *head;
    size_t head_size;
    uint8_t *body;       /* owned by the event */
    size_t body_size;
} h2_event;

/* A header of an HTTP response. */
typedef struct {
    const uint8_t *name, *value;
    size_t name_size, value_size;
} h2_header;

/* Frees an owner that h2_push and the like were given; called by h2_collect and h2_free only. */
typedef void (*h2_drop)(void *owner);

/* NULL when there is no memory. */
h2_conn *h2_new(const h2_limits *limits);
void h2_free(h2_conn *c, h2_drop drop);

/* Take in what came from the peer. Returns 0, or a libnghttp2 error after which the connection is beyond help: pull
 * once more, then close. */
int h2_feed(h2_conn *c, const uint8_t *data, size_t size);

/* The next event, or NULL; h2_feed and h2_pull make them. Valid until the next call of h2_next, h2_feed or h2_pull. */
h2_event *h2_next(h2_conn *c);
bool h2_has_events(const h2_conn *c);

/* All of these return 0; 1 when the stream is gone or has its reply already, which is not an error; or a libnghttp2
 * error. `owner` keeps `data` alive and is handed back through h2_collect, unless the result is H2_NOT_TAKEN. */
enum { H2_NOT_TAKEN = -1 }; /* no memory, and nothing was done */
int h2_admit(h2_conn *c, int32_t stream);
int h2_credit(h2_conn *c, int32_t stream, size_t taken);
int h2_push(h2_conn *c, int32_t stream, const uint8_t *data, size_t size, bool compressed, void *owner);
int h2_reply(h2_conn *c, int32_t stream, const uint8_t *data, size_t size, bool compressed, void *owner);
int h2_time(h2_conn *c, int32_t stream, const char *timing, size_t size); /* a trailer, for a reply that is yet to come */
int h2_finish(h2_conn *c, int32_t stream, int status, const char *message, size_t message_size, const char *details,
              size_t details_size);
int h2_respond(h2_conn *c, int32_t stream, int status, const h2_header *headers, size_t count, bool last);
int h2_data(h2_conn *c, int32_t stream, const uint8_t *data, size_t size, bool last, void *owner);
int h2_reset(h2_conn *c, int32_t stream, uint32_t code);

/* Bytes queued for the stream; asks for H2_DRAINED once they are `mark` or fewer. 0 when the stream is gone. */
size_t h2_queued(h2_conn *c, int32_t stream, size_t mark);

/* Bytes for the peer, about `limit` at most; valid until the next call of h2_pull or h2_collect. */
size_t h2_pull(h2_conn *c, size_t limit, const uint8_t **bytes);

/* Let go of the owners whose bytes were pulled or dropped. */
void h2_collect(h2_conn *c, h2_drop drop);

/* Tell the peer to open no more streams: at once to itself, and for good once it has answered a ping, so that no
 * stream it has already sent is lost. */
int h2_shut(h2_conn *c);

/* From now on every call that succeeds says this of us in its trailers, as endpoint-load-metrics-bin (gRPC A51): base64,
 * 0 bytes for nothing. */
int h2_load(h2_conn *c, const char *report, size_t size);

/* End the connection now, with an error code of RFC 9113. */
int h2_abandon(h2_conn *c, uint32_t code);

/* Ask for a sign of life. */
int h2_ping(h2_conn *c);

/* Tell the time, in seconds of CLOCK_MONOTONIC; to be called every second or so. A stream of whose waiting reply the peer
 * took nothing worth mentioning for `patience` seconds is reset, whatever else the peer says meanwhile. A request whose
 * headers took longer ends the connection. A call counts for a quarter of `patience` at most. */
void h2_tick(h2_conn *c, double now, double patience);

bool h2_alive(const h2_conn *c);              /* false once there is nothing more to read or to write */
bool h2_retired(const h2_conn *c);            /* h2_shut is through: no new stream can come */
size_t h2_pending(const h2_conn *c);          /* bytes of replies queued and not pulled */
size_t h2_streams(const h2_conn *c);          /* streams not over */
const char *h2_fault(const h2_conn *c);       /* why we gave the peer up, or NULL */
const char *h2_library(void);                 /* version of libnghttp2 */

#endif
