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
        key = message.key
        if isinstance(message, Put):
            self.held[key] = message.value
            tell = self.asked.pop(key, [])
        elif key in self.held:
            tell = [uid]
        else:
            self.asked.setdefault(key, []).append(uid)
            return []
        return [(one, Held(message.generation, key, self.held[key])) for one in tell]
