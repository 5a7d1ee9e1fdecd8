"""The names that saved pictures carry lead back to the same sampler and schedule."""

from __future__ import annotations

import pytest

from pocketdiffusion.sampling import SAMPLERS, SCHEDULES
from pocketdiffusion.sampling.names import sampler_and_schedule, sampler_label, schedule_label, schedule_name


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_labels_lead_back(name: str) -> None:
    assert sampler_and_schedule(sampler_label(name), SAMPLERS, SCHEDULES) == (name, None)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_labels_lead_back(name: str) -> None:
    assert schedule_name(schedule_label(name), SCHEDULES) == name
