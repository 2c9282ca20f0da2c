"""Colours for classes that have none of their own."""

Colour = tuple[int, int, int]


def default_palette(count: int) -> tuple[Colour, ...]:
    """PASCAL VOC's colour map: the bits of a class's number, dealt out to red, green and blue in turn, the
    lowest to each channel's highest. The first 256 differ; the first is black."""
    return tuple(_colour(number) for number in range(count))


def _colour(number: int) -> Colour:
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            bit = number >> (3 * place + channel) & 1
            channels[channel] |= bit << (7 - place)
    return channels[0], channels[1], channels[2]
