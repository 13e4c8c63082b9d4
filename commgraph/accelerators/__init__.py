"""Code that is for accelerators only: platforms, strategies, kernels over the peers' memory, streams, the order of calls on a device.

No device has run any of it. The tests run it on stand-ins: host memory for a device's, torch's gloo for its backend, a list of words for
its streams, a stub of torch_xla. `tests/gpu/run.sh` runs on an NVIDIA GPU what stand-ins cannot show and reports what it saw in
`docs/gpu.txt`, which records no such run yet.
"""
