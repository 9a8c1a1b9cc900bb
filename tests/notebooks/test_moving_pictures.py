"""What moves in the notebooks as committed: the slider in a browser, the film frame by frame."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

CAPTION = 18  # pixels above the pictures
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def output(notebook, kind):
    """The only output of a notebook that has data of this kind."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    (found,) = [each for each in data if kind in each]
    return {key: "".join(text) for key, text in found.items()}


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_the_slider_shows_another_image_at_each_place(browser, tmp_path):
    """Moved by keys as a reader would; its first image is the one shown without scripts."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    data = output("01_composed_retrieval", "text/html")
    (tmp_path / "page.html").write_text(f"<!doctype html>{data['text/html']}")
    browser.get((tmp_path / "page.html").as_uri())
    image, bar = (browser.find_element(By.TAG_NAME, name) for name in ("img", "input"))
    most, shown = int(bar.get_attribute("max")), {}
    bar.send_keys(Keys.HOME)
    for place in range(most + 1):
        assert bar.get_attribute("value") == str(place)
        shown[place] = opened(image.get_attribute("src").split(",")[1]).convert("RGB")
        assert int(image.get_attribute("naturalWidth")) == shown[place].width > 300
        bar.send_keys(Keys.ARROW_RIGHT)
    assert most >= 4 and len({picture.tobytes() for picture in shown.values()}) == most + 1
    assert opened(data["image/png"]).convert("RGB").tobytes() in {
        picture.tobytes() for picture in shown.values()}


def test_the_film_moves_and_ends_with_the_still():
    data = output("03_losses_and_training", "image/gif")
    film = opened(data["image/gif"])
    frames = [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(film)]
    assert len(frames) >= 4 and film.info["duration"] >= 300 and film.info["loop"] == 0
    changed = [(abs(after - before)[CAPTION:].max(axis=2) > 30).mean()
               for before, after in zip(frames, [*frames[1:], frames[0]], strict=True)]
    assert min(changed) > 0.001, "a frame like the one before"
    assert changed[-1] > 0.5, "the last is like the first"
    still = np.asarray(opened(data["image/png"]).convert("RGB"), int)
    assert still.shape == frames[-1].shape and abs(still - frames[-1]).mean() < 3
