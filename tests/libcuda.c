/* A driver without a GPU: the functions of libcuda.so.1 that cuda.py calls, on ordinary memory, strict about their use.

   "Device" memory is malloc'ed, so that a pointer means the same to whoever stands in for TensorRT. Copies to the host
   are made when the stream is waited for, not before: who reads too early reads old values. While the stream is captured
   nothing runs, and whatever cannot be captured ends the capture. With -DNVIDIA_HEADER the signatures are compared with
   cuda.h by the compiler.

   CUDA_FAKE_MEMORY   bytes of device memory (default 1 GiB)
   CUDA_FAKE_FAIL     NAME=CODE: this function fails
   CUDA_FAKE_LOG      file that gets a line for every call */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef NVIDIA_HEADER
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#else
typedef int CUresult, CUdevice, CUdevice_attribute;
typedef unsigned long long CUdeviceptr;
typedef void *CUcontext, *CUstream, *CUevent, *CUgraph, *CUgraphExec;
typedef int CUstreamCaptureMode;
#endif

enum { OK = 0, INVALID_VALUE = 1, NO_MEMORY = 2, NO_DEVICE = 100, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_READY = 600 };
enum { CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, NOT_CAPTURED = 903 };
enum { CONTEXTS, STREAMS, EVENTS, DEVICE_MEMORY, HOST_MEMORY, GRAPHS, EXECUTABLES, KINDS, MANY = 256 };

struct block { char *start; size_t size; int kind, time; };
struct copy { void *to; const void *from; size_t size; };
static struct block blocks[MANY];
static struct copy copies[MANY];
static int queued, now, waited, current;
/* What stands in for TensorRT puts its work into a capture as one function, which a launch of the graph calls. */
typedef void (*work)(void);
static work captured;
static int capturing, invalidated;

static int start(const char *name) {
    const char *log = getenv("CUDA_FAKE_LOG"), *fail = getenv("CUDA_FAKE_FAIL");
    size_t length = strlen(name);
    if (log) {
        FILE *file = fopen(log, "a");
        fprintf(file, "%s\n", name);
        fclose(file);
    }
    return fail && !strncmp(fail, name, length) && fail[length] == '=' ? atoi(fail + length + 1) : OK;
}

#define START(name) do { int code = start(name); if (code) return code; } while (0)
#define IN_CONTEXT(name) do { START(name); if (!current) return INVALID_CONTEXT; } while (0)
#define NOT_IN_CAPTURE(name) do { IN_CONTEXT(name); if (capturing) { invalidated = 1; return CAPTURE_UNSUPPORTED; } } while (0)

static struct block *find(const void *address, size_t size, int kind) {
    for (int i = 0; i < MANY; i++)
        if (blocks[i].start && blocks[i].kind == kind && (const char *)address >= blocks[i].start &&
            (const char *)address + size <= blocks[i].start + blocks[i].size)
            return &blocks[i];
    return NULL;
}

static void *make(int kind, size_t size) {
    for (int i = 0; i < MANY; i++)
        if (!blocks[i].start) {
            blocks[i] = (struct block){malloc(size), size, kind, -1};
            return memset(blocks[i].start, 0xAB, size);
        }
    return NULL;
}

static int drop(void *address, int kind) {
    struct block *found = find(address, 0, kind);
    if (!found || found->start != address)
        return kind == DEVICE_MEMORY || kind == HOST_MEMORY ? INVALID_VALUE : INVALID_HANDLE;
    free(found->start);
    found->start = NULL;
    return OK;
}

static size_t used(int kind) {
    size_t sum = 0;
    for (int i = 0; i < MANY; i++)
        sum += blocks[i].start && blocks[i].kind == kind ? blocks[i].size : 0;
    return sum;
}

static size_t total(void) { return getenv("CUDA_FAKE_MEMORY") ? strtoull(getenv("CUDA_FAKE_MEMORY"), NULL, 10) : 1u << 30; }

/* For tests: how many things of a kind were never given back. */
int fake_live(int kind);
int fake_live(int kind) {
    int count = 0;
    for (int i = 0; i < MANY; i++)
        count += blocks[i].start && blocks[i].kind == kind;
    return count;
}

CUresult cuInit(unsigned int flags) { START("cuInit"); return flags ? INVALID_VALUE : OK; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { START("cuDeviceGet"); *device = 7; return ordinal ? NO_DEVICE : OK; }

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    START("cuDeviceGetName");
    snprintf(name, length, "A GPU of the tests");
    return device == 7 ? OK : INVALID_VALUE;
}

CUresult cuDeviceGetPCIBusId(char *address, int length, CUdevice device) {
    START("cuDeviceGetPCIBusId");
    snprintf(address, length, "0000:65:00.0");
    return device == 7 ? OK : INVALID_VALUE;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    START("cuDeviceGetAttribute");
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 : -1;
    return device == 7 ? OK : INVALID_VALUE;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    START("cuDevicePrimaryCtxRetain");
    *context = make(CONTEXTS, 1);
    return device == 7 ? OK : INVALID_VALUE;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    START("cuDevicePrimaryCtxRelease_v2");
    for (int i = 0; i < MANY; i++)
        if (blocks[i].start && blocks[i].kind == CONTEXTS) {
            current = 0;
            return drop(blocks[i].start, CONTEXTS);
        }
    return INVALID_CONTEXT;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    START("cuCtxSetCurrent");
    current = find(context, 0, CONTEXTS) != NULL;
    return current ? OK : INVALID_CONTEXT;
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    IN_CONTEXT("cuMemGetInfo_v2");
    *total_bytes = total(), *free_bytes = total() - used(DEVICE_MEMORY);
    return OK;
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    NOT_IN_CAPTURE("cuMemAlloc_v2");
    if (!size) return INVALID_VALUE;
    if (used(DEVICE_MEMORY) + size > total()) return NO_MEMORY;
    *address = (CUdeviceptr)make(DEVICE_MEMORY, size);
    return OK;
}

CUresult cuMemFree_v2(CUdeviceptr address) { NOT_IN_CAPTURE("cuMemFree_v2"); return drop((void *)address, DEVICE_MEMORY); }

CUresult cuMemAllocHost_v2(void **address, size_t size) {
    NOT_IN_CAPTURE("cuMemAllocHost_v2");
    *address = make(HOST_MEMORY, size);
    return OK;
}

CUresult cuMemFreeHost(void *address) { NOT_IN_CAPTURE("cuMemFreeHost"); return drop(address, HOST_MEMORY); }

static int usable(CUdeviceptr device, const void *host, size_t size, CUstream stream) {
    if (!find(stream, 0, STREAMS)) return INVALID_HANDLE;
    return find((void *)device, size, DEVICE_MEMORY) && find(host, size, HOST_MEMORY) ? OK : INVALID_VALUE;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    NOT_IN_CAPTURE("cuMemcpyHtoDAsync_v2");
    int code = usable(to, from, size, stream);
    if (!code) memcpy((void *)to, from, size);
    return code;
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    NOT_IN_CAPTURE("cuMemcpyDtoHAsync_v2");
    int code = usable(from, to, size, stream);
    if (!code) copies[queued++] = (struct copy){to, (void *)from, size};
    return code;
}

CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
    IN_CONTEXT("cuStreamCreate");
    *stream = make(STREAMS, 1);
    return OK;
}

CUresult cuStreamSynchronize(CUstream stream) {
    NOT_IN_CAPTURE("cuStreamSynchronize");
    if (!find(stream, 0, STREAMS)) return INVALID_HANDLE;
    for (int i = 0; i < queued; i++) memcpy(copies[i].to, copies[i].from, copies[i].size);
    queued = 0, waited = now;
    return OK;
}

CUresult cuStreamDestroy_v2(CUstream stream) { IN_CONTEXT("cuStreamDestroy_v2"); return drop(stream, STREAMS); }

/* For tests: 0 where the stream is not being captured, and the work is to be done now; else it is part of the graph. */
int fake_captured(CUstream stream, work function);
int fake_captured(CUstream stream, work function) {
    if (capturing && find(stream, 0, STREAMS)) captured = function;
    return capturing;
}

CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
    NOT_IN_CAPTURE("cuStreamBeginCapture_v2");
    if (!find(stream, 0, STREAMS) || mode != 1) return INVALID_VALUE; /* 1: of this thread */
    capturing = 1, invalidated = 0, captured = NULL;
    return OK;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    int was_capturing = capturing;
    capturing = 0, *graph = NULL; /* whatever it returns, the capture has ended */
    IN_CONTEXT("cuStreamEndCapture");
    if (!was_capturing || !find(stream, 0, STREAMS)) return NOT_CAPTURED;
    if (invalidated) return CAPTURE_INVALIDATED;
    *graph = make(GRAPHS, sizeof(work));
    memcpy(*graph, &captured, sizeof(work));
    return OK;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph, unsigned long long flags) {
    NOT_IN_CAPTURE("cuGraphInstantiateWithFlags");
    if (flags || !find(graph, 0, GRAPHS)) return INVALID_VALUE;
    *executable = make(EXECUTABLES, sizeof(work));
    memcpy(*executable, graph, sizeof(work));
    return OK;
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    NOT_IN_CAPTURE("cuGraphLaunch");
    if (!find(executable, 0, EXECUTABLES) || !find(stream, 0, STREAMS)) return INVALID_HANDLE;
    work function;
    memcpy(&function, executable, sizeof(work));
    if (function) function();
    return OK;
}

CUresult cuGraphDestroy(CUgraph graph) { IN_CONTEXT("cuGraphDestroy"); return drop(graph, GRAPHS); }

CUresult cuGraphExecDestroy(CUgraphExec executable) { IN_CONTEXT("cuGraphExecDestroy"); return drop(executable, EXECUTABLES); }

CUresult cuEventCreate(CUevent *event, unsigned int flags) {
    IN_CONTEXT("cuEventCreate");
    *event = make(EVENTS, 1);
    return OK;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    NOT_IN_CAPTURE("cuEventRecord");
    struct block *found = find(event, 0, EVENTS);
    if (!found || !find(stream, 0, STREAMS)) return INVALID_HANDLE;
    found->time = ++now;
    return OK;
}

/* One millisecond from each recorded event to the next. */
CUresult cuEventElapsedTime(float *ms, CUevent from, CUevent to) {
    IN_CONTEXT("cuEventElapsedTime");
    struct block *first = find(from, 0, EVENTS), *second = find(to, 0, EVENTS);
    if (!first || !second || first->time < 0 || second->time < 0) return INVALID_HANDLE;
    if (second->time > waited) return NOT_READY;
    *ms = (float)(second->time - first->time);
    return OK;
}

CUresult cuEventDestroy_v2(CUevent event) { IN_CONTEXT("cuEventDestroy_v2"); return drop(event, EVENTS); }

CUresult cuGetErrorName(CUresult code, const char **text) {
    *text = code == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : code == 719 ? "CUDA_ERROR_LAUNCH_FAILED"
        : code == CAPTURE_INVALIDATED ? "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" : NULL;
    return *text ? OK : INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = code == NO_DEVICE ? "no CUDA-capable device is detected" : code == 719 ? "unspecified launch failure" : NULL;
    return *text ? OK : INVALID_VALUE;
}
