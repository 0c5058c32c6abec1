/* A PJRT plugin that stands between torch_tpu and a plugin for the CPU, so that torch_tpu runs without a TPU.

   torch_tpu gives the client options that only libtpu knows, and asks compiled programs where their results lie, which
   XLA:CPU does not answer. All other calls go through as they are. TUNIX_PJRT_PLUGIN names the plugin for the CPU. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pjrt_c_api.h"

static PJRT_Api api;           /* what torch_tpu gets */
static const PJRT_Api* inner;  /* the plugin for the CPU */

static PJRT_Error* create_client_without_options(PJRT_Client_Create_Args* args) {
  size_t given = args->num_options;
  args->num_options = 0;
  PJRT_Error* error = inner->PJRT_Client_Create(args);
  args->num_options = given;
  return error;
}

/* Says that all results lie in the device's own memory. */
static PJRT_Error* output_memory_kinds(PJRT_Executable_OutputMemoryKinds_Args* args) {
  static const char kind[] = "device";
  static const char** kinds;
  static size_t* sizes;
  static size_t room;
  PJRT_Executable_NumOutputs_Args outputs = {
      .struct_size = PJRT_Executable_NumOutputs_Args_STRUCT_SIZE, .executable = args->executable};
  PJRT_Error* error = inner->PJRT_Executable_NumOutputs(&outputs);
  if (error) return error;
  if (outputs.num_outputs > room) { /* the old arrays stay, since callers may still read them */
    room = 2 * outputs.num_outputs;
    kinds = malloc(room * sizeof *kinds);
    sizes = malloc(room * sizeof *sizes);
    for (size_t i = 0; i < room; i++) {
      kinds[i] = kind;
      sizes[i] = sizeof kind - 1;
    }
  }
  args->num_outputs = outputs.num_outputs;
  args->memory_kinds = kinds;
  args->memory_kind_sizes = sizes;
  return NULL;
}

const PJRT_Api* GetPjrtApi(void) {
  if (inner) return &api;
  const char* path = getenv("TUNIX_PJRT_PLUGIN");
  void* library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
  const PJRT_Api* (*get)(void) = library ? (const PJRT_Api* (*)(void))dlsym(library, "GetPjrtApi") : NULL;
  if (!get) {
    fprintf(stderr, "TUNIX_PJRT_PLUGIN=%s: no PJRT plugin: %s\n", path ? path : "", path ? dlerror() : "not set");
    exit(2);
  }
  inner = get();
  memcpy(&api, inner, inner->struct_size < sizeof api ? inner->struct_size : sizeof api);
  if (api.struct_size > sizeof api) api.struct_size = sizeof api;
  api.PJRT_Client_Create = create_client_without_options;
  api.PJRT_Executable_OutputMemoryKinds = output_memory_kinds;
  return &api;
}
