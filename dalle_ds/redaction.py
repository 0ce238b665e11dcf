"""Remove passwords, tokens and signatures of urls from texts that are shown or stored: messages, logs, recipes, records.

Every log line and every summary comes through here, with whatever captions and names it has, so the time must be linear.
"""

import re

USER = re.compile(r"(?<=://)[^/?#\s\"'<>|]*@")
"""User and password, or a token, before the host. A password may contain an @, so the last @ before the path counts."""
KEY = re.compile(r"[?&;]([^=&;?#\s\"']+)=")
VALUE = re.compile(r"[^&;#\s\"'<>]*")
SECRET = re.compile(r"^(sig|key)$|passw|pwd|secret|token|signature|credential|api[-_]?key|access[-_]?key", re.IGNORECASE)
"""Names of parameters whose values are secret."""
BARE_USER, BARE_HOST = re.compile(r"(?:^|[:=(])([^:=(]+):."), re.compile(r"[\w.\[-]+(:\d|$)")
"""User and password before an @, and host after it, in a url whose scheme is missing, as in a mistyped value."""
HIDDEN = "REDACTED"


def redacted(text: str) -> str:
    """`text` without what is secret in its urls: users with their passwords disappear, secret parameters get another value.

    What remains of an MLflow url still names the server: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD supply the rest.
    """
    text = USER.sub("", text)
    parts, end = [], 0
    for found in KEY.finditer(text):
        if found.start() >= end and SECRET.search(found[1]) and (value := VALUE.match(text, found.end())) and value[0]:
            parts += [text[end : found.end()], HIDDEN]
            end = value.end()
    return "".join([*parts, text[end:]])


def redacted_message(text: str) -> str:
    """As `redacted`, also for urls without a scheme, as in a message about a mistyped one."""
    return redacted("".join(map(_without_user, re.split(r"([\s/\"']+)", text))) if "@" in text else text)


def _without_user(word: str) -> str:
    before, *after = word.split("@")
    kept = [before]
    for place, part in enumerate(after, start=1):
        host, user = BARE_HOST.match(part), BARE_USER.search(kept[-1])
        is_last = place == len(after)
        if user and host and (is_last or host[1]):
            kept[-1] = kept[-1][: user.start(1)] + part
        else:
            kept.append(part)
    return "@".join(kept)
