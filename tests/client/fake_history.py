"""The history as `fake_server.Fake` serves it: a version made of others answers like what it is told to add up."""

# ruff: noqa: N802  (methods are named as the protos name them)

from collections.abc import Iterator
from typing import Any

import grpc

from errata.v1 import common_pb2, evaluation_pb2, history_pb2, history_pb2_grpc, model_pb2


class FakeHistory(history_pb2_grpc.HistoryServiceServicer):
    """For the fake server, whose versions, answers and work it uses. It searches one version after another."""

    def CreateDerivation(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        parent = self.resolve(request.parent, context)
        derivation = history_pb2.Derivation(parent=parent)
        kind = request.WhichOneof("operation")
        derivation.kind = history_pb2.DerivationKind.Value(
            f"DERIVATION_KIND_{kind.upper().replace('ADAPTER', 'IMPORT')}"
        )
        named = getattr(request, kind)
        sources = list(named.versions) if kind == "compose" else [named.version] if kind != "adapter" else []
        derivation.sources.extend(self.resolve(name, context) for name in sources)
        facts = [fact for name in derivation.sources for fact in self.versions[name].facts]
        derivation.facts.extend(f"revert {fact}" if kind == "revert" else fact for fact in facts)
        derivation.facts.extend(named.facts if kind == "adapter" else ())
        self._contradict(derivation)
        work = self.made_work(derivation, lambda message: self._derive(message, request))
        return history_pb2.CreateDerivationResponse(derivation=self._create(request, "derivations", work, context))

    def _contradict(self: Any, derivation: Any) -> None:
        told: dict[str, tuple[str, str]] = {}
        for name in derivation.sources if derivation.kind == history_pb2.DERIVATION_KIND_COMPOSE else ():
            for fact in self.versions[name].facts:
                what, _, answer = fact.partition(" → ")
                if what in told and told[what][1] != answer:
                    before = history_pb2.VersionFact(version=told[what][0], fact=f"{what} → {told[what][1]}")
                    now = history_pb2.VersionFact(version=name, fact=fact)
                    derivation.conflicts.add(first=before, second=now, key_overlap=0.5)
                told[what] = (name, answer)

    def _derive(self: Any, derivation: Any, request: Any) -> None:
        if derivation.conflicts and not request.allow_conflicts:
            derivation.job.state = common_pb2.STATE_FAILED
            derivation.job.error.CopyFrom(common_pb2.Failure(reason="EDITS_CONFLICT", message="two targets"))
            return
        number = sum(name.startswith("models/atlas/") for name in self.versions)
        name = f"models/atlas/versions/{number}"
        reverts = derivation.kind == history_pb2.DERIVATION_KIND_REVERT
        taken = self.versions[derivation.sources[0]].parent if reverts else ""
        self.answers[name] = dict(self.answers[taken or derivation.parent])
        for source in () if reverts else derivation.sources:
            self.answers[name].update(self.answers[source])
        derivation.version = name
        derivation.layers.append(2)
        derivation.job.state = common_pb2.STATE_SUCCEEDED
        if derivation.kind == history_pb2.DERIVATION_KIND_SQUASH:
            derivation.equality.CopyFrom(
                history_pb2.Equality(max_logit_difference=1e-6, n=1, same_answers=1, rank_before=4, rank_after=2)
            )
        if reverts:
            score = evaluation_pb2.MetricScore(metric=evaluation_pb2.METRIC_EFFICACY, n=1, before=1.0, after=1.0)
            derivation.later.add(version=derivation.parent, facts=["later"], scores=[score])
            derivation.reverted.add(metric=evaluation_pb2.METRIC_EFFICACY, question="?", before="new", after="old")
        self.versions[name] = model_pb2.Version(
            name=name,
            parent=derivation.parent,
            derivation=derivation.name,
            state=model_pb2.VERSION_STATE_READY,
            facts=derivation.facts,
        )

    def GetDerivation(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        return history_pb2.GetDerivationResponse(derivation=self._look(request.name, "DERIVATION", context))

    def ListDerivations(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        page, token = self._list("derivations", request, context)
        return history_pb2.ListDerivationsResponse(derivations=page, next_page_token=token)

    def CancelDerivation(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        return history_pb2.CancelDerivationResponse(derivation=self._cancel(request.name, "DERIVATION", context))

    def WatchDerivation(self: Any, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for derivation in self._watch(request.name, "DERIVATION", context):
            yield history_pb2.WatchDerivationResponse(derivation=derivation)

    def CompareVersions(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        first, second = (self.resolve(name, context) for name in (request.first, request.second))
        asked = [p.prompt.text for p in request.probes] or [
            text for text, said in self.answers[second].items() if self.answers[first].get(text) != said
        ]
        facts = [history_pb2.VersionFact(version=second, fact=fact) for fact in self.versions[second].facts]
        return history_pb2.CompareVersionsResponse(
            first=first,
            second=second,
            only_second=facts,
            layers=[history_pb2.LayerDifference(layer=2, relative_norm=0.01, rank=4)],
            answers=[
                history_pb2.AnswerPair(
                    question=text, first=self.answers[first].get(text, ""), second=self.answers[second].get(text, "")
                )
                for text in asked
            ],
        )

    def CreateBisection(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        bad = self.resolve(request.bad, context)
        good = self.resolve(request.good or f"{bad.partition('/versions/')[0]}/versions/0", context)
        bisection = history_pb2.Bisection(bad=bad, good=good)
        work = self.made_work(bisection, lambda message: self._search(message, request))
        return history_pb2.CreateBisectionResponse(bisection=self._create(request, "bisections", work, context))

    def _search(self: Any, bisection: Any, request: Any) -> None:
        lineage = [bisection.bad]
        while self.versions[lineage[-1]].parent:
            lineage.append(self.versions[lineage[-1]].parent)
        for version in lineage[lineage.index(bisection.good) - 1 :: -1]:
            failed = [r for r in (self._result(bisection.good, version, p) for p in request.probes) if not r.passed]
            bisection.steps.add(version=version, good=not failed, failed=failed)
            if failed:
                bisection.first_bad = version
                bisection.facts.extend(self.versions[version].facts)
                bisection.job.state = common_pb2.STATE_SUCCEEDED
                return
        bisection.job.state = common_pb2.STATE_FAILED
        bisection.job.error.CopyFrom(common_pb2.Failure(reason="NOTHING_TO_BISECT", message="passes", field="bad"))

    def _result(self: Any, good: str, version: str, probe: Any) -> evaluation_pb2.ProbeResult:
        before, after = (self.answers[v].get(probe.prompt.text, "") for v in (good, version))
        expected = probe.expected if probe.HasField("expected") else before
        return evaluation_pb2.ProbeResult(
            metric=probe.metric,
            question=probe.prompt.text,
            expected=expected,
            before=before,
            after=after,
            passed=after == expected,
        )

    def GetBisection(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        return history_pb2.GetBisectionResponse(bisection=self._look(request.name, "BISECTION", context))

    def ListBisections(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        page, token = self._list("bisections", request, context)
        return history_pb2.ListBisectionsResponse(bisections=page, next_page_token=token)

    def CancelBisection(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        return history_pb2.CancelBisectionResponse(bisection=self._cancel(request.name, "BISECTION", context))

    def WatchBisection(self: Any, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for bisection in self._watch(request.name, "BISECTION", context):
            yield history_pb2.WatchBisectionResponse(bisection=bisection)
