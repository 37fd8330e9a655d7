"""Saving of retrofitted networks: the weights as safetensors, and a recipe from which the network is rebuilt.

A folder written by ``save_retrofitted`` holds two files and no pickle::

    weights.safetensors   every entry of the state dict; tied tensors once
    recipe.json           format, base (library, name, arguments), add_se options, plan, tied names, versions

``save_se`` writes a single file with only the SE modules, a few percent of the network, to load onto the same base.
"""

from .hub import from_pretrained, model_card, push_to_hub
from .modules import load_se, save_se
from .networks import load_retrofitted, save_retrofitted

__all__ = ["from_pretrained", "load_retrofitted", "load_se", "model_card", "push_to_hub", "save_retrofitted", "save_se"]
