"""The kernels for sm_90a on a model of its asynchronous instructions (model.h)."""
