"""Methods compose: speculative Jacobi and LANTERN in ZipAR's order, every row in flight with guesses of its own.

python pipelines/llamagen_combined.py
"""

from varaccel import AutoPipeline, Jacobi, Lantern, ZipAR

pipe = AutoPipeline.from_pretrained("mini-llamagen")
prompts = ["a red sphere left of a blue cube at sunset", "a large green cone"]
for accelerator in (
    ZipAR(window=8),
    Jacobi(window=8, order=8),
    Lantern(k=10, delta=0.2, order=8),
):
    print(pipe(prompts, seed=0, accelerator=accelerator).stats)
