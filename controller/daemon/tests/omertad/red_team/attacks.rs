//! What the red team does, and who must notice. SECURITY.md shows this table.

/// One attack.
pub struct Attack {
    /// What the guest is asked for by.
    pub name: &'static str,
    /// What it does, for people.
    pub does: &'static str,
    /// All of those must notice.
    pub noticed_by: &'static [Witness],
}

/// Who notices, and by what.
pub enum Witness {
    /// The guard: a frame dropped for this reason, which says so much, and what it is taken for. Where others were sent
    /// within ten seconds it may be taken for a scan as well.
    Kernel {
        reason: &'static str,
        attempt: &'static str,
        frame: &'static str,
    },
    /// The agent's answers, or that there are none.
    Agent {
        report: &'static str,
        what: &'static str,
    },
    /// The guest's console.
    Console { line: &'static str },
}

use Witness::{Agent, Console, Kernel};

/// A frame for an address of the internet.
const fn stranger(frame: &'static str) -> Witness {
    Kernel {
        reason: "endpoint",
        attempt: "stranger",
        frame,
    }
}

const fn agent(report: &'static str, what: &'static str) -> Witness {
    Agent { report, what }
}

/// Each ends a guest of its own, by its first frame; the agent is not asked.
pub const ENDING: [Attack; 4] = [
    Attack {
        name: "broken_vpn_at_boot",
        does: "boots with a VPN that is configured wrongly, and goes out without it",
        noticed_by: &[stranger("198.51.100.79")],
    },
    Attack {
        name: "direct_internet",
        does: "flushes its firewall and connects to a web server of the internet",
        noticed_by: &[stranger("198.51.100.80:80")],
    },
    Attack {
        name: "tunnel_fails_open",
        does: "removes its tunnel and goes on without it",
        noticed_by: &[stranger("198.51.100.81")],
    },
    Attack {
        name: "lan_scan",
        does: "looks for hosts on the provider's network",
        noticed_by: &[Kernel {
            reason: "endpoint",
            attempt: "lan_probe",
            frame: "192.168.1.1",
        }],
    },
];

/// Ends a guest of its own, by its agent's silence.
pub const ENDING_BY_AGENT: Attack = Attack {
    name: "agent_killed",
    does: "kills its agent (SIGKILL)",
    noticed_by: &[agent("missed", "")],
};

/// In one guest, which is only told of, in this order. From the third on, nothing of its own is in the way.
pub const TOLD: [Attack; 23] = [
    Attack {
        name: "past_its_firewall",
        does: "pings past the tunnel; its own firewall blocks it, and the guard sees nothing",
        noticed_by: &[Console {
            line: "DST=203.0.113.9",
        }],
    },
    Attack {
        name: "console_forged",
        does: "writes its firewall's line itself",
        noticed_by: &[Console {
            line: "forged by root",
        }],
    },
    Attack {
        name: "rules_flushed",
        does: "flushes its firewall",
        noticed_by: &[agent("changed", "firewall")],
    },
    Attack {
        name: "tunnel_removed",
        does: "removes its tunnel",
        noticed_by: &[agent("changed", "tunnel")],
    },
    Attack {
        name: "metadata",
        does: "connects to a cloud's metadata service",
        noticed_by: &[Kernel {
            reason: "peer_address",
            attempt: "metadata",
            frame: "169.254.169.254",
        }],
    },
    Attack {
        name: "dns",
        does: "sends to a resolver of its choice",
        noticed_by: &[Kernel {
            reason: "endpoint",
            attempt: "dns",
            frame: "198.51.100.53:53",
        }],
    },
    Attack {
        name: "forged_address",
        does: "sends from an address that is not its own",
        noticed_by: &[Kernel {
            reason: "source_address",
            attempt: "spoof",
            frame: "198.51.100.200",
        }],
    },
    Attack {
        name: "other_guest",
        does: "pings another guest",
        noticed_by: &[Kernel {
            reason: "endpoint",
            attempt: "other_guest",
            frame: ".77",
        }],
    },
    Attack {
        name: "hosts_services",
        does: "connects to the host's end of its link",
        noticed_by: &[Kernel {
            reason: "endpoint",
            attempt: "other_guest",
            frame: ":22",
        }],
    },
    Attack {
        name: "arp_scan",
        does: "asks by ARP for another than its gateway",
        noticed_by: &[Kernel {
            reason: "arp_target",
            attempt: "lan_probe",
            frame: "192.168.1.77",
        }],
    },
    Attack {
        name: "arp_poison",
        does: "says by ARP that it is the gateway",
        noticed_by: &[Kernel {
            reason: "arp_sender",
            attempt: "spoof",
            frame: "arp",
        }],
    },
    Attack {
        name: "dhcp",
        does: "asks for another address by DHCP",
        noticed_by: &[Kernel {
            reason: "source_address",
            attempt: "spoof",
            frame: "255.255.255.255:67",
        }],
    },
    Attack {
        name: "ipv6",
        does: "turns IPv6 on and uses an address of its choice",
        noticed_by: &[Kernel {
            reason: "source_address",
            attempt: "spoof",
            frame: "2001:db8::2",
        }],
    },
    Attack {
        name: "fragments",
        does: "sends its consumer fragments",
        noticed_by: &[Kernel {
            reason: "fragment",
            attempt: "crafted",
            frame: "192.0.2.10",
        }],
    },
    Attack {
        name: "consumers_other_port",
        does: "connects to another port of its consumer",
        noticed_by: &[stranger("192.0.2.10:80")],
    },
    Attack {
        name: "icmp_exfiltration",
        does: "carries something out in an echo",
        noticed_by: &[Kernel {
            reason: "endpoint",
            attempt: "icmp_exfiltration",
            frame: "198.51.100.82",
        }],
    },
    Attack {
        name: "clock_moved",
        does: "moves its clock 70 years and sends",
        noticed_by: &[stranger("198.51.100.85")],
    },
    Attack {
        name: "console_flooded",
        does: "floods its console with its firewall's lines and sends behind that",
        noticed_by: &[stranger("198.51.100.86"), Console { line: "flood" }],
    },
    Attack {
        name: "ring_flooded",
        does: "sends thousands of frames to fill the ring of events",
        noticed_by: &[Kernel {
            reason: "endpoint",
            attempt: "icmp_exfiltration",
            frame: "198.51.100.87",
        }],
    },
    Attack {
        name: "agent_stopped",
        does: "stops its agent (SIGSTOP)",
        noticed_by: &[agent("missed", "")],
    },
    Attack {
        name: "agent_replaced",
        does: "kills its agent and starts another in its place",
        noticed_by: &[agent("replaced", ""), agent("forged", "")],
    },
    Attack {
        name: "agents_port_garbled",
        does: "writes to its agent's port itself",
        noticed_by: &[agent("garbled", "")],
    },
    Attack {
        name: "forged_mac",
        does: "sends from a MAC that is not its own",
        noticed_by: &[Kernel {
            reason: "source_mac",
            attempt: "spoof",
            frame: "52:54:00:de:ad:01",
        }],
    },
];

/// The rows of the table, in Markdown.
pub fn table() -> String {
    let mut rows = String::from(
        "| what root in the guest does | who notices | what becomes of it |\n| --- | --- | --- |\n",
    );
    let ending = ENDING.iter().map(|attack| (attack, "ended"));
    let by_agent = [(&ENDING_BY_AGENT, "ended")];
    let told = TOLD.iter().map(|attack| (attack, "told"));
    for (attack, becomes) in ending.chain(by_agent).chain(told) {
        let witnesses: Vec<_> = attack.noticed_by.iter().map(Witness::words).collect();
        let line = format!(
            "| {} | {} | {becomes} |\n",
            attack.does,
            witnesses.join("; ")
        );
        rows.push_str(&line);
    }
    rows
}

impl Witness {
    pub fn words(&self) -> String {
        match self {
            Kernel {
                reason, attempt, ..
            } => format!("the kernel, `{reason}`, taken for `{attempt}`"),
            Agent { report, what: "" } => format!("the host's end of the agent, `{report}`"),
            Agent { report, what } => format!("the agent, `{report}`: {what}"),
            Console { .. } => "the console".to_owned(),
        }
    }
}
