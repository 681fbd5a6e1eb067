"""Paint another thing into the middle of an image, without training for it.

python pipelines/var_inpaint.py
"""

from pathlib import Path

from PIL import Image

from varaccel import AutoPipeline
from varaccel.pipelines.pixels import grid

pipe = AutoPipeline.from_pretrained("mini-var")
before = pipe("a large green cone", seed=0).images[0]
width, height = before.size
mask = Image.new("L", before.size)  # black stays, white is painted anew
mask.paste(255, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
out = pipe.inpaint(before, mask, "a red sphere", seed=0)
after = out.images[0]

folder = Path("outputs")
folder.mkdir(exist_ok=True)
before.save(folder / "var-inpaint-before.png")
after.save(folder / "var-inpaint-after.png")
grid([before, mask.convert("RGB"), after], columns=3).save(folder / "var-inpaint-sheet.png")
print(out.stats)
