"""What members of one view tell each other by key, through the coordinator. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastickpt.elastic.messages import Ask, Held, Put


@dataclass
class Board:
    """Of one view. A key is told to whoever asked for it, before it was set or after."""

    held: dict[str, bytes] = field(default_factory=dict)
    asked: dict[str, list[str]] = field(default_factory=dict)

    def take(self, uid: str, message: Put | Ask) -> list[tuple[str, Held]]:
        """Who is told what, now that `uid` has said this."""
        if isinstance(message, Put):
            self.held[message.key] = message.value
            tell = [(one, message.key) for one in self.asked.pop(message.key, ())]
        else:
            tell = [(uid, key) for key in message.keys if key in self.held]
            for key in message.keys:
                if key not in self.held:
                    self.asked.setdefault(key, []).append(uid)
        return [(one, Held(message.generation, key, self.held[key])) for one, key in tell]
