// Streams and events: only handles, everything is synchronous.
#include <chrono>

#include "runtime/runtime.h"

using namespace ptxsim;

namespace {
struct Stream {
  unsigned flags;
  int priority;
  unsigned long long id;
};
struct Event {
  double time = 0;
  bool recorded = false;
};
// The default streams are the numbers 0 to 2.
Stream* created_stream(cudaStream_t handle) { return (u64)handle > 2 ? (Stream*)handle : nullptr; }
double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
}  // namespace

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  static unsigned long long next_id = 10;
  *stream = (cudaStream_t) new Stream{flags, priority, next_id++};
  return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete created_stream(stream);
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return runtime_error(sticky_error()); }
API cudaError_t cudaStreamQuery(cudaStream_t) { return runtime_error(sticky_error()); }
API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  Stream* created = created_stream(stream);
  *flags = created ? created->flags : 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  Stream* created = created_stream(stream);
  *priority = created ? created->priority : 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  Stream* created = created_stream(stream);
  *id = created ? created->id : (u64)stream;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) {
  *device = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t*,
                                         const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                         size_t* dependencies) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (dependencies) *dependencies = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  fprintf(stderr, "ptxsim: graph capture is not supported\n");
  return runtime_error(cudaErrorNotSupported);
}
API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) {
  return runtime_error(cudaErrorNotSupported);
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t*, void*, cudaHostFn_t, unsigned, unsigned) {
  return runtime_error(cudaErrorNotSupported);
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) {
  return runtime_error(cudaErrorNotSupported);
}
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
  return runtime_error(cudaErrorNotSupported);
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback,
                                      void* argument, unsigned) {
  callback(stream, sticky_runtime_error(), argument);
  return cudaSuccess;
}
API cudaError_t cudaStreamAttachMemAsync(cudaStream_t, void*, size_t, unsigned) {
  return cudaSuccess;
}
API cudaError_t cudaStreamSetAttribute(cudaStream_t, cudaLaunchAttributeID,
                                       const cudaLaunchAttributeValue*) {
  return cudaSuccess;
}
API cudaError_t cudaStreamGetAttribute(cudaStream_t, cudaLaunchAttributeID,
                                       cudaLaunchAttributeValue* value) {
  memset(value, 0, sizeof *value);
  return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = (cudaEvent_t) new Event;
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete (Event*)event;
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  ((Event*)event)->time = now();
  ((Event*)event)->recorded = true;
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return runtime_error(sticky_error()); }
API cudaError_t cudaEventQuery(cudaEvent_t) { return runtime_error(sticky_error()); }
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = (float)((((Event*)end)->time - ((Event*)start)->time) * 1e3);
  return cudaSuccess;
}

PER_THREAD_STREAM(cudaStreamQuery);
PER_THREAD_STREAM(cudaStreamGetFlags);
PER_THREAD_STREAM(cudaStreamGetId);
PER_THREAD_STREAM(cudaStreamGetPriority);
PER_THREAD_STREAM(cudaStreamGetDevice);
PER_THREAD_STREAM(cudaEventRecord);
PER_THREAD_STREAM(cudaEventRecordWithFlags);
PER_THREAD_STREAM(cudaStreamWaitEvent);
PER_THREAD_STREAM(cudaStreamAddCallback);
PER_THREAD_STREAM(cudaStreamAttachMemAsync);
PER_THREAD_STREAM(cudaStreamSynchronize);
PER_THREAD_STREAM(cudaStreamGetAttribute);
PER_THREAD_STREAM(cudaStreamSetAttribute);
PER_THREAD_STREAM(cudaStreamIsCapturing);
PER_THREAD_STREAM(cudaStreamGetCaptureInfo);
PER_THREAD_STREAM(cudaStreamBeginCapture);
PER_THREAD_STREAM(cudaStreamEndCapture);
