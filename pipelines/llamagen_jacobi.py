"""The same law in a third of the passes: speculative Jacobi decoding needs no drafter and no training.

python pipelines/llamagen_jacobi.py
"""

from pathlib import Path

from varaccel import AutoPipeline, Jacobi

pipe = AutoPipeline.from_pretrained("mini-llamagen")
prompt = "a red sphere left of a blue cube at sunset"
plain = pipe(prompt, seed=0)
fast = pipe(prompt, seed=0, accelerator=Jacobi(window=16, coupling="gumbel"))

folder = Path("outputs")
folder.mkdir(exist_ok=True)
fast.images[0].save(folder / "llamagen-jacobi.png")
fast.acceptance_maps(overlay=True)[0].save(folder / "llamagen-jacobi-passes.png")  # which pass wrote what
print(plain.stats)
print(fast.stats)
