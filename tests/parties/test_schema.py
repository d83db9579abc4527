"""The API against its own OpenAPI document: schemathesis draws requests, right and wrong ones."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS

from tests.parties.world import MODEL

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
EXAMPLES = 40
"""Of each operation."""
NAMES = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
]


@pytest.fixture(scope="module")
def api(world):
    """The owner's proxy, and the document of the API behind it."""
    with world.service("alice") as service:
        document = service.document("GET", "/openapi.json")
    with world.proxy("alice") as url:
        yield url.removesuffix("/v1"), document


def test_no_request_is_a_fault_of_the_service(api, world):
    url, document = api
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    found = [it.ok() for it in schema.get_all_operations()]
    operations = [it for it in found if it.path != "/healthz"]  # of which the proxy has its own
    assert len(operations) > 15
    for operation in operations:
        _exercise(operation, url)
    with world.service("alice") as service:  # after all of it
        assert MODEL in service.request("GET", "/v1/models").text


def _exercise(operation, url: str) -> None:
    wanted = CHECKS.get_by_names(NAMES)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def one(case) -> None:
        response = case.call(base_url=url, timeout=60)
        case.validate_response(response, checks=wanted)

    one()
