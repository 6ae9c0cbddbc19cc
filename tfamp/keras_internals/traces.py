"""What traces read of a model, and what they do not."""

import keras

# What no later trace reads of a model or a layer: what fits, evaluations and
# calls set, while they run and for good; and books that are kept of the rest.
UNREAD_BY_TRACES = frozenset(
    {
        "_aggregate_additional_loss",
        "history",
        "stop_training",
        "stop_evaluating",
        "stop_predicting",
        "train_function",
        "test_function",
        "predict_function",
        "_losses",
        "_auto_config",
        "_build_shapes_dict",
        "_inbound_nodes",
        "_nodes",
        "_nodes_by_depth",
        "_operations_by_depth",
        "_outbound_nodes",
        "_self_unconditional_checkpoint_dependencies",
        "_self_unconditional_dependency_names",
        "_self_unconditional_deferred_dependencies",
        "_self_update_uid",
        "_tracker",
    }
)

# What joins the layers of a functional model: made once, and never changed.
JOINTS = (keras.KerasTensor, keras.src.ops.node.Node)
