"""The same distribution in a third of the passes: speculative Jacobi decoding needs no drafter and no training.

python pipelines/llamagen_jacobi.py
"""

from pathlib import Path

from varaccel import AutoPipeline, Jacobi

pipe = AutoPipeline.from_pretrained("mini-llamagen")
prompts = ["a red sphere left of a blue cube at sunset", "a large green cone"]
plain = pipe(prompts, seed=0)
fast = pipe(prompts, seed=0, accelerator=Jacobi(window=16, coupling="gumbel"))

folder = Path("outputs")
folder.mkdir(exist_ok=True)
for index, (image, passes) in enumerate(zip(fast.images, fast.acceptance_maps(overlay=True), strict=True)):
    image.save(folder / f"llamagen-jacobi-{index}.png")
    passes.save(folder / f"llamagen-jacobi-{index}-passes.png")  # which pass wrote which token
print(plain.stats)
print(fast.stats)
