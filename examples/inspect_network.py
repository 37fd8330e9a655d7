"""Looking inside a retrofitted network: table, graph, difference, drawing, page.

python examples/inspect_network.py
"""

import tempfile
from pathlib import Path

import torchvision

from se_retrofit import add_se, draw, print_graph, report
from se_retrofit.inspection import block_graphs, print_difference, write_page

folder = Path(tempfile.mkdtemp())
model = add_se(torchvision.models.mobilenet_v2(num_classes=10), reduction=16)

# what was put where, and what it costs
found = report(model)
print(found)
print(f"\ncheapest site: {min(found.rows, key=lambda row: row.multiply_adds or 0).path}\n")

# the tree of modules; one block's graph and code; its code before and after
print_graph(model)
print_graph(model, "features.3")
print_difference(model, "features.3")

# the graphs themselves are torch.fx.Graph objects
graph = block_graphs(model)["features.3"].after.graph
print("\nnodes:", ", ".join(node.name for node in graph.nodes))

# a drawing as Graphviz's text (.svg and .png need Graphviz) and all of it as one HTML page
print("\ndrew", draw(model, folder / "mobilenet_v2.dot").name)
print("wrote", write_page(model, folder / "mobilenet_v2.html", example_inputs=None).name, "in", folder)
