/* The Python face of h2.c: `appliance.wire._h2.Session`. Stable ABI: one build serves CPython 3.11 and later.
 *
 * No Python code runs while a connection is being fed or pulled: events are collected first and turned into tuples
 * after. The interpreter lock is let go for blocks that are large enough to pay for it.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "h2.h"

#include <string.h>

enum { UNLOCKED_FROM = 64 * 1024 }; /* bytes; taking the lock again costs a few microseconds when others want it */

typedef struct {
    PyObject_HEAD
    h2_conn *conn;
    PyObject *last_head; /* the head of the call before, most often the same bytes: their hash is known already */
    bool busy;           /* another thread is inside, without the lock */
} Session;

static void drop(void *owner)
{
    Py_DECREF((PyObject *)owner);
}

/* ---- life ---- */

static PyObject *session_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"max_message", "max_headers", "max_streams", "window", NULL};
    unsigned long long max_message, max_headers;
    unsigned int max_streams, window;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "KKII", names, &max_message, &max_headers, &max_streams, &window))
        return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Session *self = (Session *)allocate(type, 0);
    if (!self)
        return NULL;
    h2_limits limits = {.max_message = max_message, .max_headers = max_headers, .max_streams = max_streams,
                        .window = window};
    self->conn = h2_new(&limits);
    if (!self->conn) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void session_dealloc(Session *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    h2_free(self->conn, drop);
    Py_XDECREF(self->last_head);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static bool enter(Session *self)
{
    if (!self->busy)
        return true;
    PyErr_SetString(PyExc_RuntimeError, "a session is used by one thread at a time");
    return false;
}

/* ---- events ---- */

static PyObject *head_object(Session *self, const h2_event *e)
{
    if (!(e->flags & H2_HEAD))
        return Py_NewRef(Py_None);
    if (self->last_head) {
        char *known;
        Py_ssize_t size;
        PyBytes_AsStringAndSize(self->last_head, &known, &size);
        if ((size_t)size == e->head_size && memcmp(known, e->head ? e->head : "", e->head_size) == 0)
            return Py_NewRef(self->last_head);
    }
    PyObject *head = PyBytes_FromStringAndSize(e->head, (Py_ssize_t)e->head_size);
    if (head) {
        Py_XDECREF(self->last_head);
        self->last_head = Py_NewRef(head);
    }
    return head;
}

static PyObject *body_object(const h2_event *e)
{
    if (!(e->flags & H2_MESSAGE))
        return Py_NewRef(Py_None);
    return PyBytes_FromStringAndSize((const char *)e->body, (Py_ssize_t)e->body_size);
}

/* (stream, flags, head, body, timeout in µs, size) */
static PyObject *event_tuple(Session *self, const h2_event *e)
{
    PyObject *parts[] = {PyLong_FromLong(e->stream), PyLong_FromUnsignedLong(e->flags), head_object(self, e),
                         body_object(e), PyLong_FromLongLong(e->timeout_us), PyLong_FromUnsignedLongLong(e->size)};
    enum { COUNT = sizeof parts / sizeof *parts };
    PyObject *tuple = PyTuple_New(COUNT);
    bool complete = tuple != NULL;
    for (Py_ssize_t i = 0; i < COUNT; i++) {
        complete = complete && parts[i];
        if (tuple)
            PyTuple_SetItem(tuple, i, parts[i]); /* takes the reference; NULL is fine in a tuple that is dropped */
        else
            Py_XDECREF(parts[i]);
    }
    if (!complete)
        Py_CLEAR(tuple);
    return tuple;
}

static PyObject *session_events(Session *self, PyObject *unused)
{
    (void)unused;
    if (!enter(self))
        return NULL;
    PyObject *list = PyList_New(0);
    while (list && h2_has_events(self->conn)) {
        PyObject *tuple = event_tuple(self, h2_next(self->conn));
        if (!tuple || PyList_Append(list, tuple))
            Py_CLEAR(list);
        Py_XDECREF(tuple);
    }
    return list;
}

/* ---- bytes in and out ---- */

static PyObject *session_feed(Session *self, PyObject *data)
{
    Py_buffer view;
    if (!enter(self) || PyObject_GetBuffer(data, &view, PyBUF_SIMPLE))
        return NULL;
    if (view.len >= UNLOCKED_FROM) {
        self->busy = true;
        Py_BEGIN_ALLOW_THREADS
        h2_feed(self->conn, view.buf, (size_t)view.len);
        Py_END_ALLOW_THREADS
        self->busy = false;
    } else {
        h2_feed(self->conn, view.buf, (size_t)view.len);
    }
    PyBuffer_Release(&view);
    h2_collect(self->conn, drop); /* streams that were cancelled have let go of their replies */
    return session_events(self, NULL);
}

static PyObject *session_pull(Session *self, PyObject *argument)
{
    size_t limit = PyLong_AsSize_t(argument);
    if ((limit == (size_t)-1 && PyErr_Occurred()) || !enter(self))
        return NULL;
    const uint8_t *bytes;
    size_t size;
    if (h2_pending(self->conn) >= UNLOCKED_FROM) {
        self->busy = true;
        Py_BEGIN_ALLOW_THREADS
        size = h2_pull(self->conn, limit, &bytes);
        Py_END_ALLOW_THREADS
        self->busy = false;
    } else {
        size = h2_pull(self->conn, limit, &bytes);
    }
    PyObject *result = PyBytes_FromStringAndSize((const char *)bytes, (Py_ssize_t)size);
    h2_collect(self->conn, drop);
    return result;
}

/* ---- replies ---- */

/* 0 → True; 1, the stream is gone → False; else an exception. */
static PyObject *answer(Session *self, int result)
{
    h2_collect(self->conn, drop);
    if (result == H2_NOT_TAKEN)
        return PyErr_NoMemory();
    if (result < 0)
        return PyErr_Format(PyExc_ConnectionError, "the HTTP/2 session failed: error %d", result);
    return PyBool_FromLong(result == 0);
}

static bool arguments(Session *self, Py_ssize_t given, Py_ssize_t expected)
{
    if (given != expected) {
        PyErr_Format(PyExc_TypeError, "%zd arguments expected, %zd given", expected, given);
        return false;
    }
    return enter(self);
}

static bool number(PyObject *object, long *value)
{
    *value = PyLong_AsLong(object);
    return *value != -1 || !PyErr_Occurred();
}

static bool text(PyObject *object, char **data, Py_ssize_t *size)
{
    return PyBytes_AsStringAndSize(object, data, size) == 0;
}

typedef int (*send_function)(h2_conn *, int32_t, const uint8_t *, size_t, bool, void *);

/* (stream, bytes, flag): the session holds on to the bytes until they are sent. */
static PyObject *send_with(send_function send, Session *self, PyObject *const *args, Py_ssize_t count)
{
    long stream, flag;
    char *data;
    Py_ssize_t size;
    if (!arguments(self, count, 3) || !number(args[0], &stream) || !text(args[1], &data, &size) ||
        !number(args[2], &flag))
        return NULL;
    Py_INCREF(args[1]);
    int result = send(self->conn, (int32_t)stream, (const uint8_t *)data, (size_t)size, flag, args[1]);
    if (result == H2_NOT_TAKEN)
        Py_DECREF(args[1]);
    return answer(self, result);
}

static PyObject *session_push(Session *self, PyObject *const *args, Py_ssize_t count)
{
    return send_with(h2_push, self, args, count);
}

static PyObject *session_reply(Session *self, PyObject *const *args, Py_ssize_t count)
{
    return send_with(h2_reply, self, args, count);
}

static PyObject *session_data(Session *self, PyObject *const *args, Py_ssize_t count)
{
    return send_with(h2_data, self, args, count);
}

static PyObject *session_time(Session *self, PyObject *const *args, Py_ssize_t count)
{
    long stream;
    char *timing;
    Py_ssize_t size;
    if (!arguments(self, count, 2) || !number(args[0], &stream) || !text(args[1], &timing, &size))
        return NULL;
    return answer(self, h2_time(self->conn, (int32_t)stream, timing, (size_t)size));
}

static PyObject *session_finish(Session *self, PyObject *const *args, Py_ssize_t count)
{
    long stream, status;
    char *message, *details;
    Py_ssize_t message_size, details_size;
    if (!arguments(self, count, 4) || !number(args[0], &stream) || !number(args[1], &status) ||
        !text(args[2], &message, &message_size) || !text(args[3], &details, &details_size))
        return NULL;
    return answer(self, h2_finish(self->conn, (int32_t)stream, (int)status, message, (size_t)message_size, details,
                                  (size_t)details_size));
}

static bool read_header(PyObject *pair, h2_header *header)
{
    PyObject *name, *value;
    char *name_data, *value_data;
    Py_ssize_t name_size, value_size;
    if (!PyArg_ParseTuple(pair, "SS", &name, &value) || !text(name, &name_data, &name_size) ||
        !text(value, &value_data, &value_size))
        return false;
    *header = (h2_header){(const uint8_t *)name_data, (const uint8_t *)value_data, (size_t)name_size,
                          (size_t)value_size};
    return true;
}

/* (stream, status, list of (name, value), last) */
static PyObject *session_respond(Session *self, PyObject *const *args, Py_ssize_t count)
{
    long stream, status, last;
    if (!arguments(self, count, 4) || !number(args[0], &stream) || !number(args[1], &status) ||
        !number(args[3], &last))
        return NULL;
    if (!PyList_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "headers are a list");
        return NULL;
    }
    Py_ssize_t size = PyList_Size(args[2]);
    h2_header *headers = PyMem_Calloc((size_t)size + 1, sizeof *headers);
    if (!headers)
        return PyErr_NoMemory();
    PyObject *result = NULL;
    Py_ssize_t read = 0;
    while (read < size && PyTuple_Check(PyList_GetItem(args[2], read)) &&
           read_header(PyList_GetItem(args[2], read), &headers[read]))
        read++;
    if (read == size)
        result = answer(self, h2_respond(self->conn, (int32_t)stream, (int)status, headers, (size_t)size, last));
    else if (!PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "headers are a list of (bytes, bytes)");
    PyMem_Free(headers);
    return result;
}

static PyObject *session_reset(Session *self, PyObject *const *args, Py_ssize_t count)
{
    long stream, code;
    if (!arguments(self, count, 2) || !number(args[0], &stream) || !number(args[1], &code))
        return NULL;
    return answer(self, h2_reset(self->conn, (int32_t)stream, (uint32_t)code));
}

static PyObject *session_admit(Session *self, PyObject *argument)
{
    long stream;
    if (!enter(self) || !number(argument, &stream))
        return NULL;
    return answer(self, h2_admit(self->conn, (int32_t)stream));
}

static PyObject *session_credit(Session *self, PyObject *const *args, Py_ssize_t count)
{
    long stream, taken;
    if (!arguments(self, count, 2) || !number(args[0], &stream) || !number(args[1], &taken))
        return NULL;
    return answer(self, h2_credit(self->conn, (int32_t)stream, (size_t)taken));
}

static PyObject *session_queued(Session *self, PyObject *const *args, Py_ssize_t count)
{
    long stream, mark;
    if (!arguments(self, count, 2) || !number(args[0], &stream) || !number(args[1], &mark))
        return NULL;
    return PyLong_FromSize_t(h2_queued(self->conn, (int32_t)stream, (size_t)mark));
}

/* ---- the connection ---- */

static PyObject *session_shut(Session *self, PyObject *unused)
{
    (void)unused;
    return enter(self) ? answer(self, h2_shut(self->conn)) : NULL;
}

static PyObject *session_ping(Session *self, PyObject *unused)
{
    (void)unused;
    return enter(self) ? answer(self, h2_ping(self->conn)) : NULL;
}

/* (now, patience), in seconds */
static PyObject *session_tick(Session *self, PyObject *const *args, Py_ssize_t count)
{
    if (!arguments(self, count, 2))
        return NULL;
    double now = PyFloat_AsDouble(args[0]), patience = PyFloat_AsDouble(args[1]);
    if (PyErr_Occurred())
        return NULL;
    h2_tick(self->conn, now, patience);
    return Py_NewRef(Py_None);
}

static PyObject *session_abandon(Session *self, PyObject *argument)
{
    long code;
    if (!enter(self) || !number(argument, &code))
        return NULL;
    return answer(self, h2_abandon(self->conn, (uint32_t)code));
}

static PyObject *session_load(Session *self, PyObject *argument)
{
    char *report;
    Py_ssize_t size;
    if (!enter(self) || !text(argument, &report, &size))
        return NULL;
    return answer(self, h2_load(self->conn, report, (size_t)size));
}

static PyObject *get_alive(Session *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(h2_alive(self->conn));
}

static PyObject *get_retired(Session *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(h2_retired(self->conn));
}

static PyObject *get_pending(Session *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(h2_pending(self->conn));
}

static PyObject *get_streams(Session *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(h2_streams(self->conn));
}

static PyObject *get_has_events(Session *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(h2_has_events(self->conn));
}

static PyObject *get_fault(Session *self, void *unused)
{
    (void)unused;
    const char *fault = h2_fault(self->conn);
    return fault ? PyUnicode_FromString(fault) : Py_NewRef(Py_None);
}

/* ---- the module ---- */

#define METHOD(name, flags) {#name, (PyCFunction)(void (*)(void))session_##name, flags, NULL}
#define PROPERTY(name) {#name, (getter)get_##name, NULL, NULL, NULL}

static PyMethodDef methods[] = {
    METHOD(feed, METH_O),        METHOD(events, METH_NOARGS),  METHOD(pull, METH_O),
    METHOD(admit, METH_O),       METHOD(credit, METH_FASTCALL), METHOD(push, METH_FASTCALL),
    METHOD(reply, METH_FASTCALL), METHOD(finish, METH_FASTCALL), METHOD(respond, METH_FASTCALL),
    METHOD(data, METH_FASTCALL), METHOD(reset, METH_FASTCALL), METHOD(queued, METH_FASTCALL),
    METHOD(shut, METH_NOARGS),   METHOD(ping, METH_NOARGS),    METHOD(abandon, METH_O),
    METHOD(tick, METH_FASTCALL), METHOD(load, METH_O),       METHOD(time, METH_FASTCALL),
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    PROPERTY(alive), PROPERTY(retired), PROPERTY(pending), PROPERTY(streams), PROPERTY(has_events), PROPERTY(fault),
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, session_new},
    {Py_tp_dealloc, session_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {0, NULL},
};

static PyType_Spec spec = {"appliance.wire._h2.Session", sizeof(Session), 0, Py_TPFLAGS_DEFAULT, slots};

static int add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        long value;
    } constants[] = {
        {"HEAD", H2_HEAD},       {"MESSAGE", H2_MESSAGE}, {"END", H2_END},       {"RESET", H2_RESET},
        {"HTTP", H2_HTTP},       {"WANT", H2_WANT},       {"TOO_BIG", H2_TOO_BIG}, {"COMPRESSED", H2_COMPRESSED},
        {"BROKEN", H2_BROKEN},   {"HEAVY", H2_HEAVY},     {"DRAINED", H2_DRAINED},
    };
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value))
            return -1;
    return PyModule_AddStringConstant(module, "LIBRARY", h2_library());
}

static int set_up(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&spec);
    if (!type)
        return -1;
    int failed = PyModule_AddObjectRef(module, "Session", type);
    Py_DECREF(type);
    return failed ? -1 : add_constants(module);
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, set_up}, {0, NULL}};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "appliance.wire._h2", "HTTP/2 connections on libnghttp2; see native/h2.h.", 0, NULL,
    module_slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__h2(void)
{
    return PyModuleDef_Init(&module_definition);
}
