"""Weights and inputs of the full-size BriVL check, made from names alone (numpy only, no files).

RandomState (MT19937, legacy normal) gives the same numbers in every numpy version."""

import zlib

import numpy as np


def fill(name, shape):
    """value of checkpoint entry `name` (name as in checkpoint['learnable'])"""
    if name.endswith("num_batches_tracked"):
        return np.array(7, dtype=np.int64)
    if name.endswith("position_ids"):
        return np.arange(shape[-1], dtype=np.int64).reshape(shape)
    n = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_mean":
        v = 0.1 * n
    elif leaf == "running_var":
        v = 1 + 0.2 * np.abs(n)
        if not (".bn3." in name or (".blocks.0." in name and ".bn2." in name)):  # keeps the signal alive
            v = 0.65 * v
    elif len(shape) == 1:
        v = 1 + 0.1 * n if leaf == "weight" else 0.05 * n
    elif "embeddings." in name:
        v = 0.5 * n
    elif len(shape) == 4:
        v = n * (1.6 / np.prod(shape[1:])) ** 0.5
    elif leaf == "in_proj_weight":
        v = n * ((4.0 if ".layers.0." in name else 1.3) / shape[1] ** 0.5)
    else:
        small = any(s in name for s in ("output.dense.", "out_proj.", "linear2."))
        v = n * ((0.5 if small else 1.2) / shape[1] ** 0.5)
    return v.astype(np.float32)


def inputs(batch=3, size=380, max_img=37, max_text=80, vocab=21128, seed=5):
    r = np.random.RandomState(seed)
    images = np.repeat(np.repeat(r.standard_normal((batch, 3, size // 20, size // 20)), 20, 2), 20, 3)
    images = (images + 0.3 * r.standard_normal(images.shape)).astype(np.float32)
    boxes = np.zeros((batch, max_img, 4), np.float32)
    img_len = np.array([max_img, 12, 1][:batch], np.int64)
    ids = np.zeros((batch, max_text), np.int64)
    text_len = np.array([max_text, 23, 6][:batch], np.int64)
    for b in range(batch):
        n = int(img_len[b])
        xy = np.sort(r.uniform(0, size, (n - 1, 2, 2)), axis=1)  # (n-1, {min,max}, {x,y})
        boxes[b, : n - 1] = xy.reshape(n - 1, 4)
        boxes[b, n - 1] = [0, 0, size, size]
        t = int(text_len[b])
        ids[b, :t] = r.randint(670, vocab - 100, t)
        ids[b, 0], ids[b, t - 1] = 101, 102
    img_mask = (np.arange(max_img)[None] < img_len[:, None]).astype(np.float32)
    text_mask = (np.arange(max_text)[None] < text_len[:, None]).astype(np.float32)
    return {"images": images, "boxes": boxes, "img_mask": img_mask, "text_ids": ids, "text_mask": text_mask}
