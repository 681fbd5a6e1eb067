"""Methods compose: speculative Jacobi and LANTERN in ZipAR's order, every row in flight with draft tokens of its own.

python pipelines/llamagen_combined.py
"""

from pathlib import Path

from varaccel import AutoPipeline, Jacobi, Lantern, ZipAR

pipe = AutoPipeline.from_pretrained("mini-llamagen")
prompts = ["a red sphere left of a blue cube at sunset", "a large green cone"]
for accelerator in (
    ZipAR(window=8),
    Jacobi(window=8, row_window=8),
    Lantern(k=10, delta=0.2, row_window=8),
):
    output = pipe(prompts, seed=0, accelerator=accelerator)
    print(output.stats)

folder = Path("outputs")
folder.mkdir(exist_ok=True)
for index, image in enumerate(output.images):  # of the last one
    image.save(folder / f"llamagen-combined-{index}.png")
