"""Look inside a retrofitted network: its table, graph, diff, drawing and HTML page.

python examples/inspect_network.py
"""

import tempfile
from pathlib import Path

import torchvision

from se_retrofit import add_se, inspect_se

folder = Path(tempfile.mkdtemp())
inspection = inspect_se(add_se(torchvision.models.mobilenet_v2(num_classes=10), reduction=16))

# where SE is, and what it costs
print(inspection)
rows = inspection.report().rows
print(f"\ncheapest site: {min(rows, key=lambda row: row.multiply_adds or 0).path}\n")

# the network's blocks; one block's graph; its code before and after
print(inspection.graph())
print(inspection.graph("features.3"))
print(inspection.diff("features.3"))

# the graphs themselves are torch.fx.Graph objects
graph = inspection.block("features.3").after.graph
print("\nnodes:", ", ".join(node.name for node in graph.nodes))

# a drawing, and everything on one HTML page
print("\ndrew", inspection.draw(folder / "mobilenet_v2.svg").name)
print("wrote", inspection.write_html(folder / "mobilenet_v2.html").name, "in", folder)
