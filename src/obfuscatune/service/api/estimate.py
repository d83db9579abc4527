"""What a job would cost in tokens, counted as its trainer counts them, before it is asked for."""

import os
from pathlib import Path
from typing import Any

from obfuscatune.errors import DataError
from obfuscatune.service import tables as rows
from obfuscatune.service.access import FINE_TUNING
from obfuscatune.service.api.context import Context, find_target
from obfuscatune.service.api.errors import ApiError
from obfuscatune.service.api.files import content_of
from obfuscatune.service.api.fine_tuning import JobBody, job_details
from obfuscatune.service.jobs import recipe_of
from obfuscatune.service.keys import Owner


def estimate_job(context: Context, owner: Owner, body: JobBody) -> dict[str, Any]:
    """Examples, steps and tokens of a job, and the tokens that its grant has left.

    Raises:
        ApiError: there is no such model or file for this owner, or the records cannot be used.
        TermsError: the grant allows no fine-tuning.
    """
    target = find_target(context, owner, body.model)
    if target.adapter is not None or target.model.tokenizer is None:
        raise ApiError(400, "The model cannot be fine-tuned now.", param="model", code="model_not_available")
    context.access.check(target.grant.model, owner.spki, FINE_TUNING)
    details = job_details(context, owner, body)
    row = context.state.get(rows.files, owner, details["training_file"])
    if row is None:
        raise ApiError(404, "The file is not there any more.", param="training_file", code="file_not_found")
    with context.estimating:  # reading a file takes memory and a core: one at a time
        counted = _count(content_of(context, owner, row), target, recipe_of(details))
    terms = target.grant.terms
    left = None if terms.tokens is None else max(0, terms.tokens - context.state.tokens_used(target.grant.id))
    return {**counted, "tokens_left": left, "enough": left is None or counted["tokens"] <= left}


def _count(content: bytes, target: Any, settings: dict[str, Any]) -> dict[str, Any]:
    from obfuscatune.training.recipe import Recipe
    from obfuscatune.training.run import load_data

    descriptor = os.memfd_create("data", os.MFD_CLOEXEC)
    path = Path(f"/proc/self/fd/{descriptor}")
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        recipe = Recipe.model_validate({"data": path, "out": Path("/nowhere"), **settings})
        data = load_data(recipe, target.model.tokenizer, target.model.config)
    except DataError as error:
        told = str(error).replace(str(path), "training_file")
        raise ApiError(400, told, param="training_file", code="invalid_training_file") from None
    finally:
        os.close(descriptor)
    examples = data.train.examples
    steps_of_epoch = -(-len(examples) // (recipe.batch_size * recipe.accumulation))
    steps = recipe.max_steps or steps_of_epoch * recipe.epochs
    tokens = round(steps / steps_of_epoch * sum(len(it.input_ids) for it in examples))
    return {"examples": len(examples), "steps": steps, "tokens": tokens, "truncated": data.train.truncated}
