"""Exact speculative decoding with the drafters that ship with the model, and with none.

python pipelines/llamagen_speculative.py
"""

from pathlib import Path

import numpy as np

from varaccel import AutoPipeline, LayerSkip, Speculative

pipe = AutoPipeline.from_pretrained("mini-llamagen")
prompt = "a red sphere left of a blue cube at sunset"
plain = pipe(prompt, seed=0)
print(plain.stats)
for accelerator in (
    Speculative("eagle", tree=4),
    Speculative("small", tree=4, adaptive=True),
    Speculative(LayerSkip((0, 4)), tree=2),
):
    print(pipe(prompt, seed=0, accelerator=accelerator).stats)

# draft tokens that are accepted where they equal what the seed draws: the very image of plain decoding
same = pipe(prompt, seed=0, accelerator=Speculative("eagle", tree="dynamic"))
print(same.stats)
print("equal pixels:", np.mean(np.asarray(same.images[0]) == np.asarray(plain.images[0])))

folder = Path("outputs")
folder.mkdir(exist_ok=True)
plain.images[0].save(folder / "llamagen-speculative-plain.png")
same.images[0].save(folder / "llamagen-speculative-dynamic.png")
