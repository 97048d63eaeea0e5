"""Masks as annotation tools know them: outlines, run lengths, files of COCO, YOLO, LabelMe, CVAT and GeoJSON."""
