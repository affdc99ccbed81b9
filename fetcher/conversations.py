"""One question to one host, in the name of credentials, with whatever the host wants first.

The steps are :func:`fetcher.auth.converse`; here they are taken. What is kept between questions is
what each host wants of its users, and tokens until they expire; never what anybody may read.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from fetcher.addresses import is_named
from fetcher.auth import (
    Asked,
    Attempt,
    Bearer,
    Outcome,
    TokenKey,
    Way,
    converse,
    token_request,
)
from fetcher.exchange import (
    MAX_ERROR_BODY,
    Answer,
    Exchange,
    Patience,
    Question,
    RegistrySettings,
)
from fetcher.refusals import Refused, refusal
from fetcher.routes import Hop, Route
from fetcher.tokens import MAX_TOKEN_BODY, Tokens

if TYPE_CHECKING:
    from fetcher.auth import Conversation
    from fetcher.credentials import Credentials
    from fetcher.hosts import Host
    from fetcher.routes import Headers

_MAX_WAYS: Final = 4096
_NO_SUCH_METHOD: Final = 405


@dataclass(frozen=True, slots=True)
class Wish:
    """What to ask of a repository."""

    method: str
    repository: str
    path: str
    """Behind ``/v2``."""
    what: str
    """It, as people would name it."""
    headers: Headers = ()
    actions: str = "pull"
    max_bytes: int = MAX_ERROR_BODY
    follow: bool = True
    patience: Patience | None = None

    def asked(self, host: Host) -> Asked:
        """Whom we ask, about what, and with which rights."""
        plain = host.scheme == "http"
        return Asked(
            host.name,
            host.netloc,
            plain,
            self.repository,
            self.actions,
            host.trust,
            self.patience,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back, and with which ``Authorization`` it was had."""

    answer: Answer
    authorization: str | None = field(repr=False)

    @property
    def is_without_method(self) -> bool:
        """Whether the host does not know the method, which it says after it has let us in."""
        return self.answer.status == _NO_SUCH_METHOD


class Conversations:
    """The talk with all hosts, for many tasks of one trio loop."""

    def __init__(self, settings: RegistrySettings) -> None:
        self._settings = settings
        self._exchange = Exchange(settings)
        self._tokens = Tokens(self._fetch_token)
        self._ways: OrderedDict[tuple[str, str, str], Way | None] = OrderedDict()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._exchange.aclose()

    def route(self, host: Host) -> Route:
        """How requests to ``host`` travel."""
        settings = self._settings
        return Route(
            host.netloc, host.name, settings.plain_http, settings.insecure, settings.proxies
        )

    async def ask(
        self, host: Host, wish: Wish, credentials: Credentials | None, stale: str | None = None
    ) -> Reply:
        """The reply to a wish; raises the refusal unless it is a success.

        ``stale`` is an authorization that is known to be of no use any more.
        """
        asked = wish.asked(host)
        conversation = converse(asked, credentials, self._way(asked)[1], stale)
        reply, way = await self._drive(conversation, host, wish)
        success = _is_success(reply, wish)
        passed_on = credentials is not None and credentials.passed
        if (success or way is not None) and not passed_on:
            # after a refusal too: only a token that was tried first is known to be stale
            self._remember(asked, way)
        if not success:
            raise refusal(Refused(asked, wish.what, reply.answer, credentials, reply.authorization))
        return reply

    async def known_authorization(
        self, host: Host, wish: Wish, credentials: Credentials | None
    ) -> tuple[bool, str | None]:
        """The ``Authorization`` that the host is known to want, and whether anything is known."""
        if credentials is not None and credentials.passed:
            return True, credentials.passed
        asked = wish.asked(host)
        known, way = self._way(asked)
        if isinstance(way, Bearer):
            key = TokenKey(asked, way.realm, way.service, credentials)
            return True, f"Bearer {await self._tokens.get(key)}"
        return known, credentials.basic if way is not None and credentials else None

    async def _drive(
        self, conversation: Conversation, host: Host, wish: Wish
    ) -> tuple[Reply, Way | None]:
        """Do what the conversation says, to its end: the last reply, and the way it took."""
        reply: Reply | None = None
        step = next(conversation)
        while True:
            told: Outcome | str
            if isinstance(step, Attempt):
                answer = await self._attempt(host, wish, step.authorization)
                reply = Reply(answer, step.authorization)
                told = Outcome(answer.status, tuple(answer.headers.get_list("www-authenticate")))
            else:
                told = await self._tokens.get(step.key, step.stale)
            try:
                step = conversation.send(told)
            except StopIteration as end:
                if reply is None:
                    raise AssertionError("a conversation has at least one attempt") from end
                return reply, end.value

    async def _attempt(self, host: Host, wish: Wish, authorization: str | None) -> Answer:
        headers = host.showing(authorization) + wish.headers
        return await self._exchange.ask(
            Question(
                method=wish.method,
                hop=Hop(host.url(wish.path), headers, host.trust),
                route=self.route(host),
                max_bytes=wish.max_bytes,
                follow=wish.follow,
                patience=wish.patience,
            )
        )

    async def _fetch_token(self, key: TokenKey) -> tuple[int, bytes]:
        request = token_request(key, self._settings.user_agent)
        headers: Headers = (("Accept", "application/json"),)
        if request.authorization is not None:
            headers += (("Authorization", request.authorization),)
        if request.form is not None:
            headers += (("Content-Type", "application/x-www-form-urlencoded"),)
        asked, settings = key.asked, self._settings
        goal = Hop(request.url, headers, asked.trust)
        if goal.host != asked.host:
            verify = not is_named(goal.host, settings.insecure)
            goal = replace(goal, trust=asked.trust.elsewhere(verify=verify))
        who = f"the token server of {asked.registry}"
        answer = await self._exchange.ask(
            Question(
                method=request.method,
                hop=goal,
                route=Route(asked.host, who, proxies=settings.proxies),
                content=request.form,
                max_bytes=MAX_TOKEN_BODY,
                # a realm was checked before a password goes to it; where it leads on was not
                follow=False,
                patience=asked.patience,
            )
        )
        return answer.status, answer.body

    def _way(self, asked: Asked) -> tuple[bool, Way | None]:
        key = (asked.host, asked.repository, asked.actions)
        return key in self._ways, self._ways.get(key)

    def _remember(self, asked: Asked, way: Way | None) -> None:
        key = (asked.host, asked.repository, asked.actions)
        self._ways[key] = way
        self._ways.move_to_end(key)
        while len(self._ways) > _MAX_WAYS:
            self._ways.popitem(last=False)


def _is_success(reply: Reply, wish: Wish) -> bool:
    status = reply.answer.status
    if 300 <= status < 400:
        return not wish.follow
    # a registry that does not do HEAD says so after it has let us in
    return status < 300 or (reply.is_without_method and wish.method == "HEAD")
