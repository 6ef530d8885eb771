"""`serve --upstream`: the parts of a sidecar before engines that run already."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Sequence

from classifiers.detector import Detector
from guard.errors import UserError
from guard.policy import Policy, load_policy
from guard.runtime import GuardRuntime
from guard.sidecar.admin import Reloader, admin_token
from guard.sidecar.context import build_sidecar
from guard.sidecar.errors import ApiError
from guard.sidecar.feeder import Feeder
from guard.sidecar.model import ServedModel, find_model
from guard.sidecar.neutral import Neutraliser
from guard.sidecar.receipts import SpoolFollower
from guard.sidecar.remote_check import KEY_VARIABLE, Offer, base_url, check_remote
from guard.sidecar.remote_probe import prove_substitution
from guard.sidecar.rules import RulesReader, Sources
from guard.sidecar.serve import Prepared, ServeSettings, review_pages
from guard.sidecar.upstream import Upstream
from guard.sidecar.upstreams import Upstreams
from guard.store.store import beside
from guard.traces import Spool

ONLY = "the engines at --upstream have no guard of ours, so a cue can only be substituted"


def prepare_remote(settings: ServeSettings) -> Prepared:
    """Checks policies, keys, model, detector, traces directory and every engine that answers; nothing is started."""
    for given, option in (
        (settings.vllm_args, "-- VLLM ARGS"),
        (settings.versions, "--versions"),
    ):
        if given:
            raise UserError(f"{option} and --upstream do not go together", fix="`serve` starts no engine here")
    policy = substituting(load_policy(settings.policy))
    urls = tuple(base_url(url) for url in settings.upstreams)
    key = os.environ.get(KEY_VARIABLE, "")
    model = find_model(settings.model)
    runtime = GuardRuntime.build(policy, Detector.load(settings.detector), model.tokenizer, model.location, model.eos)
    traces = settings.traces.resolve()
    reader = RulesReader(
        Sources(
            settings.policy, settings.detector, settings.keys, traces / "detectors", settings.canary,
            settings.canary_percent,
        ),
        runtime,
        substituting,
    )  # fmt: skip
    rules, token = reader.read(), admin_token(settings.admin_token_file)
    offer = asyncio.run(_check(urls, key, model))
    spool = Spool(traces)
    clients = [Upstream(url, key) for url in urls]
    sidecar = build_sidecar(
        runtime,
        Neutraliser(model.tokenizer),
        clients[0],
        SpoolFollower(traces),
        # The engines learn nothing of it: tenants' cache salts are made from it.
        secret=secrets.token_urlsafe(32),
        alive=lambda: True,
        spool=spool,
        served_name=offer.model,
        # Their operator knows whether they run on a CPU, where a seed can stop an engine (docs/serve.md).
        allow_seed=True,
        # Nobody can tell from here which weights answer, so traces name none.
        weights="",
        upstreams=Upstreams(clients, rules.default, prove_substitution),
    )
    sidecar.models = offer.names
    sidecar.adopt(rules)
    sidecar.reloader = Reloader(sidecar, reader, token)
    feeder = Feeder(traces, settings.store or beside(traces), sidecar.metrics)
    feeder.open()
    sidecar.completions = settings.completions
    sidecar.limits = settings.limits(sidecar.metrics)
    return Prepared(None, sidecar, model, feeder, review_pages(settings, sidecar, model))


def substituting(policy: Policy, whose: str = "The policy") -> Policy:
    """The policy in mode `substitute`; UserError when it says `inject` itself."""
    if policy.mode == "inject" and "mode" in policy.model_fields_set:
        raise UserError(f"{whose}, key `mode`: {ONLY}", got="inject", wanted="substitute")
    return policy.model_copy(update={"mode": "substitute"})


async def _check(urls: Sequence[str], key: str, model: ServedModel) -> Offer:
    """Asks every engine; those that do not answer are left to the health checks, unless it is all of them."""
    offers: dict[str, Offer] = {}
    silent: list[str] = []
    for url in urls:
        client = Upstream(url, key)
        try:
            offers[url] = await check_remote(client, url, model.tokenizer)
        except ApiError as error:
            silent.append(f"{url}: {error.message.rstrip('.')}")
        finally:
            await client.close()
    if not offers:
        raise UserError("No --upstream answers", got="; ".join(silent), fix="Start the engines first")
    first, *others = offers.items()
    for url, offer in others:
        if offer.model != first[1].model:
            raise UserError(
                f"Upstream {url} serves another model than {first[0]}", got=offer.model, wanted=first[1].model
            )
    return Offer(first[1].model, frozenset(name for offer in offers.values() for name in offer.names))
