/* A CUDA runtime without a GPU, for a process that has this library preloaded: PyTorch sees one device, and may ask it
   anything but to compute. Nothing is allocated on it, no kernel can run, streams and events do nothing.

   It is also found as the driver, libcuda.so.1. NO_GPU_CAPABILITY says which architecture the device has, "90" or "75". */
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#define TOTAL (80ul << 30)

static int current = 0;
static size_t free_bytes = TOTAL;

void no_gpu_set_free(size_t bytes) { free_bytes = bytes; }

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current = device; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 1000 * 12 + 80; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -1; return cudaSuccess; }
cudaError_t cudaFree(void *pointer) { return pointer ? cudaErrorNotSupported : cudaSuccess; }
cudaError_t cudaMalloc(void **pointer, size_t size) { return cudaErrorMemoryAllocation; }

cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *unused = free_bytes, *total = TOTAL;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    const char *capability = getenv("NO_GPU_CAPABILITY");
    memset(found, 0, sizeof *found);
    strcpy(found->name, "no GPU");
    found->major = capability[0] - '0', found->minor = capability[1] - '0';
    found->totalGlobalMem = TOTAL;
    found->multiProcessorCount = 132, found->warpSize = 32;
    found->maxThreadsPerBlock = 1024, found->maxThreadsPerMultiProcessor = 2048;
    found->sharedMemPerBlock = 48 << 10, found->sharedMemPerBlockOptin = 227 << 10;
    return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) { return "an error"; }
const char *cudaGetErrorString(cudaError_t error) { return "there is no GPU that could do this"; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    static size_t count = 16;
    *stream = (cudaStream_t)++count;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = (cudaEvent_t)1; return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaSuccess; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
