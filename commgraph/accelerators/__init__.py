"""Code that is for accelerators only: platforms, strategies, kernels over the peers' memory, streams, the order of calls on a device.

No device has run any of it. The tests run it on stand-ins: host memory for a device's, torch's gloo for its backend, a log of calls for
its streams, a stub of torch_xla. `tests/gpu/run.sh` runs the tests that need an NVIDIA GPU and reports their results in
`docs/gpu.txt`, which records no such run yet.
"""
