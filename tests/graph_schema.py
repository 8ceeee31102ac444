"""JSON schemas of `graph.json`: Neuronpedia's, and ours beside it."""

import folders

STRING, NUMBER = {"type": "string"}, {"type": "number"}


def an_object(required, **optional):
    return {"type": "object", "required": list(required), "properties": required | optional}


def a_list(items):
    return {"type": "array", "items": items}


#: The schema that Neuronpedia validates uploads with, written down from its description.
NEURONPEDIA = {"$schema": "http://json-schema.org/draft-07/schema#"} | an_object(
    dict(
        metadata=an_object(
            dict(slug=STRING, scan=STRING, prompt_tokens=a_list(STRING), prompt=STRING),
            node_threshold=NUMBER,
            schema_version={"type": "integer"},
            info=an_object(
                {},
                description=STRING,
                creator_name=STRING,
                creator_url=STRING,
                source_urls=a_list(STRING),
                generator=an_object({}, name=STRING, version=STRING, url=STRING, email=STRING),
                create_time_ms=NUMBER,
            ),
            generation_settings=an_object(
                {},
                max_n_logits={"type": "integer"},
                desired_logit_prob=NUMBER,
                batch_size={"type": "integer"},
                max_feature_nodes={"type": "integer"},
            ),
            pruning_settings=an_object({}, node_threshold=NUMBER, edge_threshold=NUMBER),
        ),
        qParams=an_object(
            {},
            pinnedIds={"anyOf": [STRING, a_list(STRING)]},
            supernodes=a_list(a_list(STRING)),
            linkType={"enum": ["both", "input", "output", "either"]},
            clickedId=STRING,
            sg_pos=STRING,
        ),
        nodes=a_list(
            an_object(
                dict(
                    node_id=STRING,
                    feature={"type": ["integer", "null"]},
                    layer={"type": ["string", "integer"]},
                    ctx_idx={"type": "integer", "minimum": 0},
                    feature_type=STRING,
                    jsNodeId=STRING,
                    clerp=STRING,
                ),
                influence=NUMBER,
                activation=NUMBER,
                token_prob=NUMBER,
                is_target_logit={"type": "boolean"},
            )
        ),
        links=a_list(an_object(dict(source=STRING, target=STRING, weight=NUMBER))),
    )
)

#: What qkattr adds.
QKATTR = an_object(
    dict(
        nodes=a_list(
            an_object(
                dict(
                    boundary={"type": "integer", "minimum": 0, "maximum": folders.BLOCKS},
                    kind={
                        "enum": [
                            *("token", "position", "feature", "error", "bias", "const"),
                            *("sink", "logit", "score"),
                        ]
                    },
                    index={"type": ["integer", "null"]},
                    effect=NUMBER,
                )
            )
        ),
        links=a_list(
            an_object(
                dict(
                    resid=NUMBER,
                    mlp=NUMBER,
                    heads={
                        "type": "object",
                        "propertyNames": {"pattern": r"^[01]\.[0-3]$"},
                        "additionalProperties": NUMBER,
                    },
                )
            )
        ),
        qkattr=an_object(
            dict(
                version=STRING,
                schema={"const": 3},
                settings=an_object(
                    dict(linearisation=STRING, read=STRING, precision=STRING, sinks={}, bos={})
                ),
                provenance=an_object(
                    dict(model_hash=STRING, saes_hash=STRING, jax=STRING, device=STRING)
                ),
                completeness=NUMBER,
                replacement=NUMBER,
                targets=a_list(an_object(dict(node=STRING, value=NUMBER, name=STRING))),
                account=a_list(
                    an_object(
                        dict(boundary={"type": "integer"}, node=STRING)
                        | {
                            name: NUMBER
                            for name in (
                                *("target", "feature", "token", "position"),
                                *("error", "sink", "bias", "const"),
                            )
                        }
                    )
                ),
                heads=a_list(an_object(dict(layer=NUMBER, head=NUMBER, effect=NUMBER))),
                leak={"type": "array", "minItems": folders.BLOCKS + 1},
                sinks={"type": "array"},
                cards={"type": "array"},
                qk={"type": "object", "propertyNames": {"pattern": r"^\d+\.\d+\.\d+\.\d+$"}},
            )
        ),
    )
)
