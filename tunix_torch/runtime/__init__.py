"""Where it computes: the device, compiled and recorded steps, meshes, processes and hosts, profiling."""
