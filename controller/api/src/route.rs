//! The paths of the API.

/// `POST` runs a guest, `GET` lists guests.
pub const GUESTS: &str = "/v1/guests";
/// `GET` shows a guest.
pub const GUEST: &str = "/v1/guests/{name}";
/// `POST` asks a guest to power down, and kills it at the deadline.
pub const GUEST_STOP: &str = "/v1/guests/{name}/stop";
/// `POST` ends a guest at once.
pub const GUEST_KILL: &str = "/v1/guests/{name}/kill";
/// `POST` makes a guest stand still.
pub const GUEST_PAUSE: &str = "/v1/guests/{name}/pause";
/// `POST` lets a guest that was paused by request run on.
pub const GUEST_RESUME: &str = "/v1/guests/{name}/resume";
/// `POST` resets a guest.
pub const GUEST_RESET: &str = "/v1/guests/{name}/reset";
/// `GET` reads a guest's console log as plain text.
pub const GUEST_LOG: &str = "/v1/guests/{name}/log";
/// `PUT` says where a guest's consumer is now.
pub const GUEST_PEER: &str = "/v1/guests/{name}/peer";
/// `GET` lists the consumers of guests.
pub const PEERS: &str = "/v1/peers";
/// `GET` reads events, one JSON object a line.
pub const EVENTS: &str = "/v1/events";
/// `GET` tells which omertad answers.
pub const VERSION: &str = "/v1/version";

/// Every path with the methods it answers.
pub const ALL: [(&str, &[&str]); 12] = [
    (GUESTS, &["get", "post"]),
    (GUEST, &["get"]),
    (GUEST_STOP, &["post"]),
    (GUEST_KILL, &["post"]),
    (GUEST_PAUSE, &["post"]),
    (GUEST_RESUME, &["post"]),
    (GUEST_RESET, &["post"]),
    (GUEST_LOG, &["get"]),
    (GUEST_PEER, &["put"]),
    (PEERS, &["get"]),
    (EVENTS, &["get"]),
    (VERSION, &["get"]),
];

/// `route` with `{name}` replaced by a guest's name.
///
/// Names are validated by the daemon; bytes that cannot stand in a path segment are
/// percent-encoded here, so that a bad name reaches it as one segment.
pub fn of_guest(route: &str, name: &str) -> String {
    let mut segment = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            segment.push(char::from(byte));
        } else {
            segment.push_str(&format!("%{byte:02X}"));
        }
    }
    route.replace("{name}", &segment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_name_stands_in_its_segment() {
        assert_eq!(of_guest(GUEST_LOG, "alpha-1"), "/v1/guests/alpha-1/log");
        assert_eq!(
            of_guest(GUEST, "../events?x"),
            "/v1/guests/%2E%2E%2Fevents%3Fx"
        );
    }
}
