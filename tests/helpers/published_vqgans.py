"""The published tokenizers in plain torch, with the parameter names of their projects: oracles for the conversion.

Written from descriptions of the networks, apart from smalti's layers. `forward` returns codes and images. How they are
filled and compared is in `parity.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn


def norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


def module(**children):
    """Returns a module that only holds others, for their names."""
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, 1, 1)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, 1, 1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class MaskgitBlock(nn.Module):
    """Without biases; the shortcut's convolution is applied to the output of the second convolution."""

    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, 1, 1, bias=False)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, 1, 1, bias=False)
        if before != after:
            self.nin_shortcut = nn.Conv2d(after, after, 1, bias=False)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(y) if hasattr(self, "nin_shortcut") else x)


class SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        b, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).view(b, c, h * w) for layer in (self.q, self.k, self.v))
        scores = (q.transpose(1, 2) @ k / c**0.5).softmax(2)  # from each position (rows) to each other one
        return x + self.proj_out((v @ scores.transpose(1, 2)).view(b, c, h, w))


def halved(x, conv):
    return conv(F.pad(x, (0, 1, 0, 1)))


def doubled(x, conv):
    return conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Tokenizer(nn.Module):
    """Encoder, 1x1 convolution, codebook, 1x1 convolution, decoder; the rule of the search is an argument."""

    def __init__(self, encoder, decoder, *, latent, width, codes, search="nearest"):
        super().__init__()
        self.encoder, self.decoder, self.search = encoder, decoder, search
        self.quant_conv, self.post_quant_conv = nn.Conv2d(latent, width, 1), nn.Conv2d(width, latent, 1)
        if search == "gumbel":
            self.quantize = module(proj=nn.Conv2d(width, codes, 1), embed=nn.Embedding(codes, width))
        else:
            self.quantize = module(embedding=nn.Embedding(codes, width))

    def quantized(self, z):
        """Returns codes and codewords of z."""
        if self.search == "gumbel":
            codes = self.quantize.proj(z).argmax(1)
            return codes, self.quantize.embed.weight[codes].permute(0, 3, 1, 2)
        vectors, codewords = z.permute(0, 2, 3, 1), self.quantize.embedding.weight
        if self.search == "unit":
            vectors, codewords = (each / each.norm(dim=-1, keepdim=True) for each in (vectors, codewords))
        products = vectors @ codewords.T
        distances = -products if self.search == "dot" else codewords.square().sum(1) / 2 - products
        codes = distances.argmin(-1)
        return codes, codewords[codes].permute(0, 3, 1, 2)

    @torch.no_grad()
    def forward(self, images):
        codes, z_q = self.quantized(self.quant_conv(self.encoder(images)))
        return codes, self.decoder(self.post_quant_conv(z_q))


class TamingEncoder(nn.Module):
    def __init__(self, widths, blocks, attends, latent, middle):
        super().__init__()
        self.conv_in, self.down = nn.Conv2d(3, widths[0], 3, 1, 1), nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            stage = module(block=nn.ModuleList(), attn=nn.ModuleList())
            for _ in range(blocks):
                stage.block.append(Block(before, width))
                before = width
                if i in attends:
                    stage.attn.append(SelfAttention(width))
            if i < len(widths) - 1:
                stage.downsample = module(conv=nn.Conv2d(width, width, 3, 2))
            self.down.append(stage)
        self.mid = taming_middle(before, middle)
        self.norm_out, self.conv_out = norm(before), nn.Conv2d(before, latent, 3, 1, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down:
            x = through(stage.block, stage.attn, x)
            x = halved(x, stage.downsample.conv) if hasattr(stage, "downsample") else x
        for layer in self.mid.children():
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class TamingDecoder(nn.Module):
    def __init__(self, widths, blocks, attends, latent, middle):
        super().__init__()
        before = widths[-1]
        self.conv_in, self.mid = nn.Conv2d(latent, before, 3, 1, 1), taming_middle(before, middle)
        stages = {}
        for i in reversed(range(len(widths))):
            stage = module(block=nn.ModuleList(), attn=nn.ModuleList())
            for _ in range(blocks + 1):
                stage.block.append(Block(before, widths[i]))
                before = widths[i]
                if i in attends:
                    stage.attn.append(SelfAttention(before))
            if i:
                stage.upsample = module(conv=nn.Conv2d(before, before, 3, 1, 1))
            stages[i] = stage
        self.up = nn.ModuleList(stages[i] for i in range(len(widths)))
        self.norm_out, self.conv_out = norm(before), nn.Conv2d(before, 3, 3, 1, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for layer in self.mid.children():
            x = layer(x)
        for i in reversed(range(len(self.up))):
            x = through(self.up[i].block, self.up[i].attn, x)
            x = doubled(x, self.up[i].upsample.conv) if i else x
        return self.conv_out(F.silu(self.norm_out(x)))


def taming_middle(width, attention):
    layers = {"block_1": Block(width, width), "attn_1": SelfAttention(width), "block_2": Block(width, width)}
    return module(**{name: layer for name, layer in layers.items() if attention or name != "attn_1"})


def through(blocks, attentions, x):
    for j, block in enumerate(blocks):
        x = block(x)
        x = attentions[j](x) if len(attentions) else x
    return x


def taming(*, widths=(32, 64), blocks=1, attends=(), latent=8, width=6, codes=40, middle=True, search="nearest"):
    """Returns the network of taming-transformers, latent diffusion, IBQ (`dot`) and Chameleon."""
    parts = [each(widths, blocks, attends, latent, middle) for each in (TamingEncoder, TamingDecoder)]
    return Tokenizer(*parts, latent=latent, width=width, codes=codes, search=search)


class LlamaGenEncoder(nn.Module):
    """Attention on the coarsest grid and in the middle."""

    def __init__(self, widths, blocks, latent):
        super().__init__()
        self.conv_in, self.conv_blocks = nn.Conv2d(3, widths[0], 3, 1, 1), nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            befores, last = [before, *[width] * (blocks - 1)], i == len(widths) - 1
            stage = module(
                res=nn.ModuleList(Block(each, width) for each in befores),
                attn=nn.ModuleList(SelfAttention(width) for _ in range(blocks if last else 0)),
            )
            if not last:
                stage.downsample = module(conv=nn.Conv2d(width, width, 3, 2))
            self.conv_blocks.append(stage)
            before = width
        self.mid = nn.ModuleList([Block(before, before), SelfAttention(before), Block(before, before)])
        self.norm_out, self.conv_out = norm(before), nn.Conv2d(before, latent, 3, 1, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.conv_blocks:
            x = through(stage.res, stage.attn, x)
            x = halved(x, stage.downsample.conv) if hasattr(stage, "downsample") else x
        for layer in self.mid:
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LlamaGenDecoder(nn.Module):
    """Its blocks are numbered from the codes outwards."""

    def __init__(self, widths, blocks, latent):
        super().__init__()
        before = widths[-1]
        self.conv_in = nn.Conv2d(latent, before, 3, 1, 1)
        self.mid = nn.ModuleList([Block(before, before), SelfAttention(before), Block(before, before)])
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(reversed(widths)):
            befores = [before, *[width] * blocks]
            stage = module(
                res=nn.ModuleList(Block(each, width) for each in befores),
                attn=nn.ModuleList(SelfAttention(width) for _ in range(0 if i else blocks + 1)),
            )
            if i < len(widths) - 1:
                stage.upsample = module(conv=nn.Conv2d(width, width, 3, 1, 1))
            self.conv_blocks.append(stage)
            before = width
        self.norm_out, self.conv_out = norm(before), nn.Conv2d(before, 3, 3, 1, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for layer in self.mid:
            x = layer(x)
        for stage in self.conv_blocks:
            x = through(stage.res, stage.attn, x)
            x = doubled(x, stage.upsample.conv) if hasattr(stage, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


def llamagen(*, widths=(32, 32, 64), blocks=2, latent=12, width=8, codes=50, used=64):
    """Returns LlamaGen's network; VQ-8 has 4 stages, VQ-16 has 5. `used` is the length of the buffer of used codes."""
    encoder, decoder = (each(widths, blocks, latent) for each in (LlamaGenEncoder, LlamaGenDecoder))
    model = Tokenizer(encoder, decoder, latent=latent, width=width, codes=codes, search="unit")
    model.quantize.register_buffer("codebook_used", torch.zeros(used))
    return model


class MaskgitEncoder(nn.Module):
    """Average pooling down, a 1x1 convolution at the end."""

    def __init__(self, widths, blocks, latent, mage):
        super().__init__()
        self.conv_in, self.down = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.ModuleList()
        before = widths[0]
        for width in widths:
            stage = [MaskgitBlock(each, width) for each in (before, *[width] * (blocks - 1))]
            self.down.append(module(block=nn.ModuleList(stage)))
            before = width
        self.mid = maskgit_middle(before, blocks, mage)
        self.norm_out, self.conv_out = norm(before), nn.Conv2d(before, latent, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for i, stage in enumerate(self.down):
            x = F.avg_pool2d(x, 2) if i else x
            x = through(stage.block, (), x)
        for layer in self.mid.children():
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MaskgitDecoder(nn.Module):
    """Its stages have as many blocks as the encoder's."""

    def __init__(self, widths, blocks, latent, mage):
        super().__init__()
        before = widths[-1]
        self.conv_in, self.mid = nn.Conv2d(latent, before, 3, 1, 1), maskgit_middle(before, blocks, mage)
        stages = {}
        for i in reversed(range(len(widths))):
            stage = [MaskgitBlock(each, widths[i]) for each in (before, *[widths[i]] * (blocks - 1))]
            stages[i], before = module(block=nn.ModuleList(stage)), widths[i]
            if i:
                conv = nn.Conv2d(before, before, 3, 1, 1)
                stages[i].add_module(*(("upsample", module(conv=conv)) if mage else ("upsample_conv", conv)))
        self.up = nn.ModuleList(stages[i] for i in range(len(widths)))
        self.norm_out, self.conv_out = norm(before), nn.Conv2d(before, 3, 3, 1, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for layer in self.mid.children():
            x = layer(x)
        for i in reversed(range(len(self.up))):
            x = through(self.up[i].block, (), x)
            if i:
                x = doubled(
                    x, self.up[i].upsample.conv if hasattr(self.up[i], "upsample") else self.up[i].upsample_conv
                )
        return self.conv_out(F.silu(self.norm_out(x)))


def maskgit_middle(width, blocks, mage):
    layers = [MaskgitBlock(width, width) for _ in range(blocks)]
    return module(**{f"block_{j + 1}": layer for j, layer in enumerate(layers)}) if mage else nn.ModuleList(layers)


class MaskgitTokenizer(Tokenizer):
    """Takes and returns images in [-1, 1], but its network's are in [0, 1]; it has no 1x1 convolutions."""

    def __init__(self, encoder, decoder, *, width, codes):
        super().__init__(encoder, decoder, latent=width, width=width, codes=codes)
        del self.quant_conv, self.post_quant_conv

    @torch.no_grad()
    def forward(self, images):
        codes, z_q = self.quantized(self.encoder(images / 2 + 0.5))
        return codes, self.decoder(z_q) * 2 - 1


def maskgit(*, widths=(32, 32, 64), blocks=2, width=16, codes=50, mage=False):
    """Returns MaskGIT's network, with the names of open-muse or of MAGE."""
    encoder, decoder = (each(widths, blocks, width, mage) for each in (MaskgitEncoder, MaskgitDecoder))
    return MaskgitTokenizer(encoder, decoder, width=width, codes=codes)
