"""Lets timm and open_clip import where there is no torchvision: their models work, their image transforms do not.

The reference models need one real thing of torchvision, `FrozenBatchNorm2d`; every other name is inert.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types


class _InertType(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _InertType(name, (cls,), {})


class _Inert(metaclass=_InertType):
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        raise NotImplementedError("torchvision is not installed; prepare pictures with PIL")


def _frozen_batch_norm():
    import torch

    class FrozenBatchNorm2d(torch.nn.Module):
        def __init__(self, features, eps=1e-5):
            super().__init__()
            self.eps = eps
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                self.register_buffer(name, torch.full((features,), value))

        def forward(self, x):
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return x * scale[None, :, None, None] + (self.bias - self.running_mean * scale)[None, :, None, None]

    return FrozenBatchNorm2d


class _Module(types.ModuleType):
    __path__ = ()
    __version__ = "0.0.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = _frozen_batch_norm() if name == "FrozenBatchNorm2d" else _InertType(name, (_Inert,), {})
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def install():
    """Puts the stand-in in place; a real torchvision wins."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())
