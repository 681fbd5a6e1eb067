import torch
from transformers import AutoProcessor, JanusForConditionalGeneration

import varaccel

name = "deepseek-community/Janus-Pro-7B"
model = JanusForConditionalGeneration.from_pretrained(name)
inputs = AutoProcessor.from_pretrained(name)(
    text=["a red sphere"], generation_mode="image", return_tensors="pt"
)
varaccel.accelerate(model, "jacobi")
torch.manual_seed(0)
tokens = model.generate(**inputs, generation_mode="image", do_sample=True, guidance_scale=5)
pixels = model.decode_image_tokens(tokens)  # [1, 384, 384, 3]
