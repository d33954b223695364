"""What the machine can do: streams, events, memory and hardware facts behind one small surface.

``registry.make_device`` gives the ``Device`` that the worker computes on; ``registry.probe_hardware`` gives the plain
``Hardware`` that ``config.resolve`` reads (no torch is imported for a CPU). To add a device, start at ``device.py``.
"""

from octavo.device.registry import find_device_type, make_device, probe_hardware

__all__ = ["find_device_type", "make_device", "probe_hardware"]
