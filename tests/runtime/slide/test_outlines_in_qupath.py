"""The outlines by other readers: valid GeoJSON, valid polygons (QuPath keeps them by JTS, as shapely does by GEOS), and
the fields that QuPath's importer takes (its page "Exporting annotations" and its class PathObjectTypeAdapter)."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from espmedsam_edge.runtime.slide.objects import write_objects
from espmedsam_edge.runtime.slide.regions import Regions

geojson = pytest.importorskip("geojson", reason="needs geojson (extra dev)")
shapely = pytest.importorskip("shapely", reason="needs shapely (extra dev)")

SIDE, SCALE = 200, 2.0


def outlined(tmp_path: Path, mask: np.ndarray, *, split: bool) -> list[dict[str, Any]]:
    regions = Regions(tmp_path, mask.shape, 96)
    for row in range(regions.rows):
        for column in range(regions.columns):
            regions.write(row, column, np.ascontiguousarray(regions.place(row, column).of(mask)))
    place = tmp_path / "a.geojson"
    count = write_objects(place, regions, name="cell nuclei", colour=(10, 20, 30), scale=SCALE, mpp=None, split=split)
    with place.open(encoding="utf-8") as file:
        collection = geojson.load(file)
    assert collection.is_valid
    assert len(collection["features"]) == count > 0
    return list(collection["features"])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("sigma", "share"), [(0.0, 0.5), (0.6, 0.7), (1.5, 0.8), (5.0, 0.6)])
def test_polygons_are_valid_and_where_the_mask_is(tmp_path: Path, sigma: float, share: float, split: bool) -> None:
    noise = np.random.default_rng(int(10 * sigma)).normal(size=(SIDE, SIDE)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), sigma) if sigma else noise
    mask = np.asarray((smooth > np.quantile(smooth, share)) * 255, np.uint8)
    polygons = [shapely.geometry.shape(one["geometry"]) for one in outlined(tmp_path, mask, split=split)]
    assert [shapely.is_valid_reason(one) for one in polygons if not one.is_valid] == []
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5  # centres of pixels, in those of the largest level
    inside = shapely.intersects_xy(shapely.unary_union(polygons), SCALE * columns.ravel(), SCALE * rows.ravel())
    wrong = inside.reshape(SIDE, SIDE) != (mask > 0)
    assert not (wrong & (cv2.dilate(mask, np.ones((3, 3), np.uint8)) == 0)).any()
    most = {0.0: 0.15, 0.6: 0.06}.get(sigma, 0.001)  # noise has pixels that meet at corners alone, which are joined
    assert wrong.mean() < most


def test_every_field_is_one_that_qupath_reads(tmp_path: Path) -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(mask, (60, 60), 20, 255, -1)
    cv2.circle(mask, (150, 150), 30, 255, 8)  # with a hole
    features = outlined(tmp_path, mask, split=False)
    assert [len(one["geometry"]["coordinates"]) for one in features] == [1, 2]
    for feature in features:
        assert feature.keys() <= {"type", "id", "geometry", "properties"}
        assert "id" not in feature or uuid.UUID(feature["id"])
        properties = feature["properties"]
        assert properties.keys() <= {"objectType", "name", "color", "classification", "measurements", "metadata"}
        assert properties["objectType"] == "detection"  # of annotation, detection, cell, tile, tmaCore, root
        assert properties["classification"] == {"name": "cell nuclei", "color": [10, 20, 30]}
        assert all(isinstance(value, int | float) for value in properties["measurements"].values())
        for ring in feature["geometry"]["coordinates"]:
            assert len(ring) >= 4  # as JTS's LinearRing asks for
            assert ring[0] == ring[-1]
    measured = sum(one["properties"]["measurements"]["Area px"] for one in features)
    assert measured == np.count_nonzero(mask)
