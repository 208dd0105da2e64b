"""Suppression of overlapping boxes inside an ONNX graph, for programs that want no postprocessing of their own."""

from __future__ import annotations

from typing import Any

from mobilevit.results.detection import IOU_THRESHOLD, MAX_DETECTIONS, SCORE_THRESHOLD


def append_nms(model: Any) -> None:
    """Add an output "selected" (M, 3), int64: image, class and anchor of each box that is kept, to a ModelProto.

    The detector's boxes and scores stay outputs, to be looked up by these. `NonMaxSuppression` wants pairs of corners,
    in either order of axes, and scores class by class.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    limits: dict[str, Any] = {
        "nms_most": np.array([MAX_DETECTIONS], np.int64),
        "nms_iou": np.array([IOU_THRESHOLD], np.float32),
        "nms_score": np.array([SCORE_THRESHOLD], np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in limits.items())
    transposed = helper.make_node("Transpose", ["scores"], ["scores_by_class"], perm=[0, 2, 1], name="nms_transpose")
    graph.node.append(transposed)
    graph.node.append(
        helper.make_node("NonMaxSuppression", ["boxes_xyxy", "scores_by_class", *limits], ["selected"], name="nms")
    )
    graph.output.append(helper.make_tensor_value_info("selected", TensorProto.INT64, ["num_selected", 3]))
