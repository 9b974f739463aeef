"""Draws the diagrams of the documentation: python docs/diagrams.py writes docs/images/*.svg.

Every diagram is a card with a background of its own, so that it is read on any page, and 400 units
wide, which a phone shows at about its own size. Whatever color tells is told by a line or a word,
too: what is trained has a solid outline, what is an average a dashed one.
"""

from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).parent / "images"
WIDTH = 400
LEFT, MIDDLE, RIGHT = 112, 200, 288  # centers of the columns
BOX, WIDE, TALL = 152, 328, 32  # widths of a box in a column and over both, a box's height
CHARACTER = 7.0  # widest that 13 units of a sans-serif take on average

_STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #16202a;
         text-anchor: middle; }
  .small { font-size: 11.5px; fill: #43505c; }
  .title { font-size: 15px; font-weight: 600; }
  .card { fill: #fbfcfd; stroke: #c6ccd2; }
  .data { fill: #eceff1; stroke: #5f6b76; }
  .net { fill: #d3e6f5; stroke: #00619e; stroke-width: 2; }
  .mean { fill: #fdebd0; stroke: #a65c00; stroke-width: 2; stroke-dasharray: 6 4; }
  .memory { fill: #f4e3ee; stroke: #9b4a7c; stroke-width: 1.5; }
  .loss { fill: #d5efe5; stroke: #00735a; stroke-width: 3; }
  .line { fill: none; stroke: #16202a; stroke-width: 1.5; }
  .average { stroke: #a65c00; stroke-dasharray: 6 4; }
  .stop { stroke: #b3261e; stroke-width: 3; }
  .head { fill: #16202a; }
  .head.average { fill: #a65c00; stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e9eef2; }
    .small { fill: #b7c1ca; }
    .card { fill: #182028; stroke: #47525d; }
    .data { fill: #2b353f; stroke: #98a5b1; }
    .net { fill: #10395a; stroke: #6db7ea; }
    .mean { fill: #4a330c; stroke: #f0a840; }
    .memory { fill: #43273a; stroke: #dc93bf; }
    .loss { fill: #0d4537; stroke: #46c7a2; }
    .line { stroke: #e9eef2; }
    .average { stroke: #f0a840; }
    .stop { stroke: #ff8a80; }
    .head { fill: #e9eef2; }
    .head.average { fill: #f0a840; }
  }
"""


class Drawing:
    """Boxes and arrows; y grows downwards and names the middle of a box."""

    def __init__(self, title: str, told: str, height: int) -> None:
        """Begins a card.

        Args:
          title: above the drawing.
          told: the same in words, for those who don't see it.
          height: in units.
        """
        self.height = height
        self.parts = [
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(told)}</desc>",
            f"<style>{_STYLE}</style>",
            f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="10"/>',
        ]
        self.text(MIDDLE, 26, title, "title")

    def text(self, x: float, y: float, words: str, kind: str = "small") -> None:
        """Words around x, on the line whose middle is y."""
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y + 4.5:g}">{escape(words)}</text>')

    def box(self, x: float, y: float, words: str, kind: str, width: float = BOX) -> None:
        """A box with words in it, which must fit."""
        lines = words.split("\n")
        if max(map(len, lines)) * CHARACTER > width - 8:
            raise ValueError(f"'{words}' doesn't fit into a box of {width} units")
        tall = TALL + 16 * (len(lines) - 1)
        self.parts.append(
            f'<rect class="{kind}" x="{x - width / 2:g}" y="{y - tall / 2:g}" '
            f'width="{width:g}" height="{tall}" rx="6"/>'
        )
        for i, line in enumerate(lines):
            self.text(x, y + 16 * (i - (len(lines) - 1) / 2), line, "")

    def line(self, *points: tuple[float, float], kind: str = "") -> None:
        """A line along points."""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="line{kind}" d="M{path}"/>')

    def stop(self, x: float, y: float) -> None:
        """Two strokes across a line: no gradient comes back along it."""
        for shift in (-3, 3):
            self.line((x - 9, y + shift + 4), (x + 9, y + shift - 4), kind=" stop")

    def arrow(self, *points: tuple[float, float], average: bool = False) -> None:
        """An arrow along points; the last piece is straight along an axis."""
        kind = " average" if average else ""
        self.line(*points, kind=kind)
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        tip = f"{x:g},{y:g} " + " ".join(
            f"{x - 8 * dx + side * 4 * dy:g},{y - 8 * dy + side * 4 * dx:g}" for side in (-1, 1)
        )
        self.parts.append(f'<polygon class="head{kind}" points="{tip}"/>')

    def down(self, x: float, y0: float, y1: float, stop: bool = False) -> None:
        """From the box at y0 to the one at y1; `stop` bars the gradient's way back."""
        self.arrow((x, y0 + TALL / 2), (x, y1 - TALL / 2 - 1))
        if stop:
            self.stop(x, (y0 + y1) / 2 - 2)

    def svg(self) -> str:
        """The file's text."""
        inside = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="{WIDTH}" height="{self.height}" role="img">\n{inside}\n</svg>\n'
        )


def two_views(drawing: Drawing, left: str = "view 1", right: str = "view 2") -> None:
    """An image and the two views of it."""
    drawing.box(MIDDLE, 62, "image", "data", 90)
    for x, name in ((LEFT, left), (RIGHT, right)):
        drawing.arrow((MIDDLE + (x - MIDDLE) / 4, 78), (x, 92), (x, 101))
        drawing.box(x, 118, name, "data")


def shared(drawing: Drawing, y: float, words: str, kind: str = "net") -> None:
    """A network that both views go through."""
    drawing.box(MIDDLE, y, words, kind, WIDE)


def in_one_network(name: str, told: str, loss: str, below: str) -> Drawing:
    """Both views through one network, to a loss over the batch."""
    drawing = Drawing(name, told, 366)
    two_views(drawing)
    shared(drawing, 178, "encoder (the same weights)")
    shared(drawing, 238, "projector (the same weights)")
    for x in (LEFT, RIGHT):
        drawing.down(x, 118, 178)
        drawing.down(x, 178, 238)
        drawing.down(x, 238, 306)
    drawing.text(LEFT + 14, 206, "h")
    drawing.text(LEFT + 14, 270, "z₁")
    drawing.text(RIGHT + 14, 270, "z₂")
    drawing.text(MIDDLE, 206, "evaluated")
    shared(drawing, 306, loss, "loss")
    drawing.text(MIDDLE, 340, below)
    return drawing


def simclr() -> Drawing:
    """SimCLR v1."""
    return in_one_network(
        "SimCLR",
        "Two views of each image go through the same encoder and the same projector. NT-Xent pulls "
        "the two projections of an image together, against those of all other images.",
        "NT-Xent: z₁ finds z₂ among all",
        "2B − 2 negatives: the others of the global batch",
    )


def simclrv2() -> Drawing:
    """SimCLR v2."""
    drawing = Drawing(
        "SimCLR v2",
        "As SimCLR, with a projector of three layers, of which fine-tuning keeps the first. With a "
        "memory, a slow average of the networks makes projections that are kept as negatives.",
        426,
    )
    two_views(drawing)
    column, aside, narrow = 118, 310, 132
    drawing.box(column, 178, "encoder", "net", 172)
    drawing.box(column, 230, "projector, layer 1", "net", 172)
    drawing.box(column, 290, "layers 2 and 3", "net", 172)
    for x in (LEFT, RIGHT):
        drawing.line((x, 134), (x, 146))
    drawing.line((LEFT, 146), (aside, 146))
    drawing.arrow((column, 146), (column, 161))
    drawing.arrow((aside, 146), (aside, 179))
    drawing.down(column, 178, 230)
    drawing.down(column, 230, 290)
    drawing.text(column + 64, 260, "fine-tuned from")
    drawing.box(aside, 204, "average of\nthe networks", "mean", narrow)
    drawing.arrow((205, 186), (243, 186), average=True)
    drawing.text(224, 174, "EMA")
    drawing.box(aside, 290, "memory", "memory", narrow)
    drawing.arrow((aside, 229), (aside, 273))
    drawing.down(column, 290, 362)
    drawing.down(aside, 290, 362)
    drawing.text(column + 40, 326, "z₁, z₂")
    drawing.text(aside - 56, 326, "more negatives")
    shared(drawing, 362, "NT-Xent: z₁ finds z₂ among all", "loss")
    drawing.text(MIDDLE, 400, "the memory is the paper's; the released code has none")
    return drawing


def moco() -> Drawing:
    """MoCo v1 and v2."""
    drawing = Drawing(
        "MoCo",
        "The query network encodes view 1. Its slow average encodes view 2, whose images change "
        "devices first. InfoNCE: the query finds its key among the keys in the queue. Afterwards "
        "the keys go into the queue. No gradient goes through keys.",
        470,
    )
    two_views(drawing)
    drawing.box(RIGHT, 170, "shuffled over devices", "data", 164)
    drawing.down(RIGHT, 118, 170)
    drawing.box(LEFT, 226, "encoder", "net")
    drawing.box(LEFT, 278, "projector", "net")
    drawing.box(RIGHT, 226, "encoder’s average", "mean")
    drawing.box(RIGHT, 278, "projector’s average", "mean")
    drawing.down(LEFT, 118, 226)
    drawing.down(RIGHT, 170, 226)
    for x in (LEFT, RIGHT):
        drawing.down(x, 226, 278)
    drawing.arrow((188, 226), (211, 226), average=True)
    drawing.arrow((188, 278), (211, 278), average=True)
    drawing.text(MIDDLE, 252, "EMA")
    drawing.down(LEFT, 278, 350)
    drawing.down(RIGHT, 278, 350, stop=True)
    drawing.text(LEFT + 30, 314, "query")
    drawing.text(RIGHT - 30, 314, "key")
    drawing.text(RIGHT + 50, 314, "no gradient")
    shared(drawing, 350, "InfoNCE: query finds key", "loss")
    drawing.box(MIDDLE, 416, "queue of 65,536 earlier keys", "memory", 224)
    drawing.arrow((MIDDLE, 400), (MIDDLE, 367))
    drawing.text(MIDDLE - 48, 384, "negatives")
    drawing.arrow((364, 278), (384, 278), (384, 416), (313, 416))
    drawing.text(MIDDLE, 450, "the batch’s own keys enter after the loss")
    return drawing


def swav() -> Drawing:
    """SwAV."""
    drawing = Drawing(
        "SwAV",
        "All crops go through the encoder and projector and are compared with the prototypes. "
        "Sinkhorn-Knopp assigns the large crops to prototypes, evenly over the batch and without "
        "gradient. Every crop predicts the assignment of the other large crop.",
        488,
    )
    two_views(drawing, "2 large crops", "6 small crops")
    shared(drawing, 178, "encoder (the same weights)")
    shared(drawing, 230, "projector, to unit length")
    shared(drawing, 282, "scores against 3,000 prototypes")
    for x in (LEFT, RIGHT):
        drawing.down(x, 118, 178)
        drawing.down(x, 178, 230)
        drawing.down(x, 230, 282)
    drawing.box(LEFT, 362, "Sinkhorn–Knopp:\neven assignments", "data", 150)
    drawing.arrow((LEFT, 298), (LEFT, 337))
    drawing.stop(LEFT, 315)
    drawing.text(LEFT - 52, 316, "no gradient")
    drawing.text(LEFT + 48, 316, "large only")
    drawing.box(RIGHT, 362, "softmax of\nscores / τ", "net", 150)
    drawing.arrow((RIGHT, 298), (RIGHT, 337))
    drawing.text(RIGHT + 36, 316, "every crop")
    for x in (LEFT, RIGHT):
        drawing.arrow((x, 386), (x, 415))
    shared(drawing, 432, "each crop predicts another’s assignment", "loss")
    drawing.text(MIDDLE, 466, "Sinkhorn sees the global batch, and a queue if it is small")
    return drawing


def predicted(drawing: Drawing, loss: str, names: tuple[str, str] = ("p", "z")) -> None:
    """The left predictor's answer against the right projection, which gets no gradient."""
    drawing.down(LEFT, 238, 298)
    drawing.down(LEFT, 298, 364)
    drawing.down(RIGHT, 238, 364, stop=True)
    drawing.text(LEFT + 16, 330, names[0])
    drawing.text(RIGHT - 20, 330, names[1])
    drawing.text(RIGHT + 54, 300, "no gradient")
    shared(drawing, 364, loss, "loss")
    drawing.text(MIDDLE, 400, "and the same with the views exchanged")


def online_and_average(drawing: Drawing) -> None:
    """Two views, a network with a predictor on the left, its average on the right."""
    two_views(drawing)
    rows = (178, 238, 298)
    for y, name in zip(rows, ("encoder", "projector", "predictor"), strict=True):
        drawing.box(LEFT, y, name, "net")
    for y, name in zip(rows[:2], ("encoder’s average", "projector’s average"), strict=True):
        drawing.box(RIGHT, y, name, "mean")
        drawing.arrow((188, y), (211, y), average=True)
    drawing.text(MIDDLE, 208, "EMA")
    for y0, y1 in ((118, 178), (178, 238)):
        drawing.down(LEFT, y0, y1)
        drawing.down(RIGHT, y0, y1)


def byol() -> Drawing:
    """BYOL."""
    drawing = Drawing(
        "BYOL",
        "The online network, encoder, projector and predictor, predicts from view 1 what the "
        "target network makes of view 2, and the reverse. The target is a slow average of the "
        "online network and gets no gradient.",
        424,
    )
    online_and_average(drawing)
    predicted(drawing, "|p − z|² of unit vectors")
    return drawing


def simsiam() -> Drawing:
    """SimSiam."""
    drawing = Drawing(
        "SimSiam",
        "Both views go through the same encoder and projector. The predictor sees one of them; the "
        "other gets no gradient. The loss is their negative cosine, and the same with the views "
        "exchanged.",
        424,
    )
    two_views(drawing)
    shared(drawing, 178, "encoder (the same weights)")
    shared(drawing, 238, "projector (the same weights)")
    drawing.box(LEFT, 298, "predictor", "net")
    for x in (LEFT, RIGHT):
        drawing.down(x, 118, 178)
        drawing.down(x, 178, 238)
    predicted(drawing, "−cos(p, z)")
    return drawing


def dino() -> Drawing:
    """DINO."""
    drawing = Drawing(
        "DINO",
        "The student, encoder and projector, sees all crops. The teacher is a slow average of the "
        "student, sees the two large crops and gets no gradient. From every crop, the student "
        "predicts the teacher's distribution over prototypes of another crop; the teacher's "
        "logits are centered and sharpened.",
        488,
    )
    two_views(drawing, "all 10 crops", "2 large crops")
    rows = (178, 238, 298)
    for y, name in zip(rows, ("encoder", "projector", "65,536 prototypes"), strict=True):
        drawing.box(LEFT, y, name, "net")
    means = ("encoder’s average", "projector’s average", "prototypes’ average")
    for y, name in zip(rows, means, strict=True):
        drawing.box(RIGHT, y, name, "mean")
        drawing.arrow((188, y), (211, y), average=True)
    drawing.text(MIDDLE, 208, "EMA")
    for y0, y1 in ((118, 178), (178, 238), (238, 298)):
        drawing.down(LEFT, y0, y1)
        drawing.down(RIGHT, y0, y1)
    drawing.box(LEFT, 372, "softmax of\nlogits / τ", "net", 150)
    drawing.box(RIGHT, 372, "softmax, centered,\nof logits / τ′", "data", 150)
    drawing.arrow((LEFT, 314), (LEFT, 347))
    drawing.arrow((RIGHT, 314), (RIGHT, 347))
    drawing.stop(RIGHT, 328)
    drawing.text(RIGHT - 54, 329, "no gradient")
    for x in (LEFT, RIGHT):
        drawing.arrow((x, 396), (x, 423))
    shared(drawing, 440, "each crop predicts another’s distribution", "loss")
    drawing.text(MIDDLE, 472, "τ′ is lower than τ; the center is an average of the logits")
    return drawing


def mocov3() -> Drawing:
    """MoCo v3."""
    drawing = Drawing(
        "MoCo v3",
        "The online network, encoder, projector and predictor, makes queries of view 1. Its slow "
        "average makes keys of view 2, without gradient. InfoNCE: each query finds its key among "
        "the keys of the global batch, and the same with the views exchanged.",
        424,
    )
    online_and_average(drawing)
    predicted(drawing, "InfoNCE: q finds k among the batch’s", ("q", "k"))
    return drawing


def supcon() -> Drawing:
    """SupCon."""
    drawing = Drawing(
        "SupCon",
        "Two views of each image go through the same encoder and the same projector. Each "
        "projection is pulled toward all other projections of its class, against those of the "
        "other classes.",
        386,
    )
    two_views(drawing)
    shared(drawing, 178, "encoder (the same weights)")
    shared(drawing, 238, "projector (the same weights)")
    for x in (LEFT, RIGHT):
        drawing.down(x, 118, 178)
        drawing.down(x, 178, 238)
        drawing.down(x, 238, 326)
    drawing.text(LEFT - 14, 206, "h")
    drawing.text(LEFT - 14, 282, "z₁")
    drawing.text(RIGHT + 14, 282, "z₂")
    drawing.text(MIDDLE, 206, "evaluated")
    drawing.box(MIDDLE, 280, "labels", "data", 90)
    drawing.arrow((MIDDLE, 296), (MIDDLE, 309))
    shared(drawing, 326, "z finds all of its class among all", "loss")
    drawing.text(MIDDLE, 360, "positives and negatives: the global batch")
    return drawing


def barlow() -> Drawing:
    """Barlow Twins."""
    return in_one_network(
        "Barlow Twins",
        "Two views of each image go through the same encoder and the same projector. Over the "
        "batch, each dimension of one view's embeddings is to correlate with the same dimension of "
        "the other's, and with no other dimension.",
        "correlations of z₁ with z₂: identity",
        "d × d correlations, over the global batch",
    )


def vicreg() -> Drawing:
    """VICReg."""
    return in_one_network(
        "VICReg",
        "Two views of each image go through the same encoder and the same projector. The two "
        "embeddings of an image are to be near each other. Over the batch, each dimension is to "
        "have a standard deviation of 1, and no covariance with the others.",
        "|z₁ − z₂|², variances, covariances",
        "variances and covariances over the global batch",
    )


def road() -> Drawing:
    """The road data takes."""
    drawing = Drawing(
        "The road data takes",
        "From the config and the index of ids, through crops on the host and colors on the "
        "device, to the method's forward, loss, the gradient, the optimizer and the method's "
        "update; then metrics, checkpoint, evaluation, report and export.",
        620,
    )
    steps = [
        ("config", "data", "seed, data, method"),
        ("index", "data", "seed, step → ids"),
        ("crops on the host", "data", "uint8, decoded once"),
        ("colors on the device", "data", "keyed by id and view"),
        ("method.forward", "net", "in microbatches, too"),
        ("method.loss", "loss", "the whole global batch"),
        ("gradient, one pmean", "data", "step.py alone"),
        ("optimizer", "data", "LARS, SGD, AdamW …"),
        ("method.update", "mean", "EMA, queue"),
        ("metrics, checkpoint", "data", "fetched a step late"),
        ("evaluate, report, export", "data", "online or EMA encoder"),
    ]
    for number, (name, kind, note) in enumerate(steps):
        y = 64 + 52 * number
        drawing.box(124, y, name, kind, 200)
        drawing.text(310, y, note)
        if number:
            drawing.down(124, y - 52, y)
    return drawing


def large_batch() -> Drawing:
    """The step of a batch that doesn't fit."""
    drawing = Drawing(
        "A batch that doesn’t fit",
        "First pass: microbatches are encoded one after the other, only embeddings are kept. The "
        "loss and its gradient by the embeddings are taken once, over the whole batch. Second "
        "pass: each microbatch is encoded again, and the gradient goes on into the parameters.",
        470,
    )
    drawing.text(MIDDLE, 64, "1. encode, keep embeddings")
    for x, told in ((138, "3. encode again"), (262, "gradients back")):
        drawing.text(x, 318, told)
    places = (76, 200, 324)
    for i, x in enumerate(places):
        drawing.box(x, 98, f"microbatch {i + 1}", "net", 108)
        drawing.down(x, 98, 160)
        drawing.box(x, 354, f"microbatch {i + 1}", "net", 108)
    drawing.box(MIDDLE, 160, "embeddings of the whole batch", "data", 356)
    drawing.down(MIDDLE, 160, 230)
    drawing.text(252, 194, "2. the loss, once")
    drawing.box(MIDDLE, 230, "loss over the global batch", "loss", 356)
    drawing.down(MIDDLE, 230, 284)
    drawing.box(MIDDLE, 284, "gradient by the embeddings", "data", 356)
    for x in places:
        drawing.down(x, 284, 354)
        drawing.down(x, 354, 416)
    drawing.box(MIDDLE, 416, "gradient of the parameters, summed", "data", 356)
    drawing.text(MIDDLE, 450, "the same keys: the same augmentation in both passes")
    return drawing


DIAGRAMS = (simclr, simclrv2, moco, swav, byol, simsiam, mocov3, barlow, vicreg, dino, supcon)
DIAGRAMS += (road, large_batch)


def main() -> None:
    """Writes all of them."""
    OUT.mkdir(exist_ok=True)
    for draw in DIAGRAMS:
        (OUT / f"{draw.__name__}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
