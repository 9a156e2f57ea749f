//! The table of options: every flag and variable, once, with the commands that take it.

use crate::balena::BALENA_CLOUD;
use crate::discovery::lan;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `baletheus`: discovery and status.
    Discover,
    /// `baletheus check`.
    Check,
    /// `baletheus tunnel`.
    Tunnel,
}

/// An option: a flag, one or more variables, or both.
pub struct Opt {
    /// Its flag without the dashes; empty if it is a variable only.
    pub flag: &'static str,
    /// Its variables; more than one are names for the same thing. balena reserves `BALENA_*`: a fleet cannot set such a variable,
    /// and the supervisor may. So it counts only where no other name is set.
    pub vars: &'static [&'static str],
    /// Its value in the help. A boolean has none, and its flag needs no value. With `,…` the flag can be repeated.
    pub value: &'static str,
    /// Text of its default; empty if there is none.
    pub default: &'static str,
    pub group: &'static str,
    pub verbs: &'static [Verb],
    pub short: &'static str,
    /// What it takes, for messages too.
    pub takes: &'static str,
    /// More about it for the long help; may be empty.
    pub more: &'static str,
}

impl Opt {
    pub fn is_boolean(&self) -> bool {
        self.value.is_empty()
    }

    /// The values that it takes, if they are a few words.
    pub fn words(&self) -> Vec<&'static str> {
        let is_word = self.is_boolean() || WORDS.contains(&self.value);
        self.takes.split([',', ' ']).filter(|word| is_word && !word.is_empty() && *word != "or").collect()
    }

    /// The flag that switches it off, if it is on by default.
    pub fn negative(&self) -> Option<&'static str> {
        match self.flag {
            "service-labels" => Some("no-service-labels"),
            "device-services" => Some("no-device-services"),
            _ => None,
        }
    }
}

const ALL: &[Verb] = &[Verb::Discover, Verb::Check, Verb::Tunnel];
/// `check` takes what discovery takes, so that a line with options serves for both.
const LIST: &[Verb] = &[Verb::Discover, Verb::Check];
const PROXY: &[Verb] = &[Verb::Tunnel];

const API: &str = "balena API";
const CHOICE: &str = "Which devices";
const TARGETS: &str = "Targets";
const FILE: &str = "Target file";
const RUN: &str = "Running";
const STATUS: &str = "Status";
const TUNNEL: &str = "Tunnel";

/// Values that are one of a few words.
const WORDS: [&str; 3] = ["MODE", "LEVEL", "FORMAT"];
const BOOL: &str = "true or false";
const PATH: &str = "the path of a file";
const ADDRESS: &str = "host:port, or :PORT for all interfaces";

#[rustfmt::skip] // a table
/// Every option. The table in docs/options.md is checked against it.
pub const OPTIONS: &[Opt] = &[
    opt("", &["API_KEY"], "KEY", "", API, ALL,
        ["named API key of balenaCloud or openBalena", "a named API key, required", "It is never a flag, since the process list shows flags."]),
    opt("api-key-file", &["API_KEY_FILE"], "PATH", "", API, ALL,
        ["file with the key, instead of API_KEY", PATH, "A key that is refused is read again from the file."]),
    opt("api-url", &["API_URL", "BALENA_API_URL"], "URL", BALENA_CLOUD, API, LIST,
        ["URL of the API", "an https URL without a path", "For openBalena, it is https://api.DOMAIN."]),
    opt("ca-file", &["CA_FILE", "BALENA_CA_FILE"], "PATH", "", API, ALL,
        ["root certificates to trust beside the system's", "the path of a PEM file", "An openBalena with its own CA needs them."]),
    opt("timeout", &["API_TIMEOUT"], "DURATION", "60s", API, LIST,
        ["limit for a whole answer of the API", "a duration with its unit, 1s to 1h", ""]),
    opt("fleet", &["FLEET", "APPLICATION"], "FLEET,…", "", CHOICE, LIST,
        ["only devices of these fleets", "a comma-separated list of fleets: slug (organization/name), id or name", ""]),
    opt("tag", &["DEVICE_TAG"], "KEY[=VALUE],…", "", CHOICE, LIST,
        ["only devices with this tag, their own or their fleet's", "key or key=value", "With several flags, a device needs all of the tags. The variable takes one tag."]),
    opt("online-only", &["ONLINE_ONLY"], "", "false", CHOICE, LIST,
        ["leave out devices that balenaCloud sees offline", BOOL, ""]),
    opt("address", &["TARGET_ADDRESS"], "MODE", "vpn", TARGETS, LIST,
        ["how Prometheus reaches the devices", "vpn, public or lan", "vpn: by baletheus tunnel; public: by public device URLs; lan: by their addresses in your network."]),
    opt("", &["USE_PUBLIC_URLS"], "", "false", TARGETS, LIST,
        ["the same as TARGET_ADDRESS=public", BOOL, ""]),
    opt("exporter", &["EXPORTERS"], "[NAME:]PORT[/PATH],…", "80", TARGETS, LIST,
        ["exporters of devices that declare none by tag or service label", "a comma-separated list such as node:9100,app:8080/internal/metrics, or none", ""]),
    opt("service-labels", &["SERVICE_LABELS"], "", "true", TARGETS, LIST,
        ["read exporters from service labels, such as prometheus.io.port", BOOL, "The labels are those of the releases that the devices run."]),
    opt("own-tags", &["OWN_TAGS"], "MODE", "narrow", TARGETS, LIST,
        ["how far a device's own tags are trusted", "narrow, all or off", "narrow: a device may choose fewer exporters and longer intervals than its fleet."]),
    opt("public-domain", &["PUBLIC_URL_DOMAIN"], "DOMAIN", "balena-devices.com", TARGETS, LIST,
        ["domain of public device URLs", "a domain name", ""]),
    opt("lan-network", &["LAN_NETWORKS"], "CIDR,…", lan::PRIVATE, TARGETS, LIST,
        ["networks whose addresses may be scraped (--address lan)", "a comma-separated list of networks such as 192.168.1.0/24", "This machine's own networks are excluded unless listed."]),
    opt("labels", &["LABELS"], "LABELS", "all", TARGETS, LIST,
        ["labels that the scraped series get; uuid is always one", "all, none, or a comma-separated list of labels", ""]),
    opt("sd-file", &["SD_FILE_PATH"], "PATH", "balena.json", FILE, ALL,
        ["path of the target file", PATH, ""]),
    opt("sd-file-mode", &["SD_FILE_MODE"], "OCTAL", "0644", FILE, LIST,
        ["permissions of the target file", "an octal number, 0400 to 0777", "Prometheus often runs as another user, and has to read the file."]),
    opt("write-empty", &["WRITE_EMPTY"], "", "false", FILE, LIST,
        ["let a list without targets replace one that has some", BOOL, ""]),
    opt("refresh", &["REFRESH_RATE"], "DURATION", "30s", RUN, LIST,
        ["time between two refreshes", "a duration such as 45s or 2m, 1s to 30d", "A bare number is milliseconds."]),
    opt("oneshot", &["ONESHOT"], "", "false", RUN, LIST,
        ["refresh once, then exit", BOOL, ""]),
    opt("dry-run", &["DRY_RUN"], "", "false", RUN, LIST,
        ["refresh once and print the list; touch no file", BOOL, ""]),
    opt("log-level", &["LOG_LEVEL"], "LEVEL", "info", RUN, ALL,
        ["how much is logged", "off, error, warn, info, debug or trace", ""]),
    opt("", &["RUST_LOG"], "FILTER", "", RUN, ALL,
        ["filter that replaces the log level", "a filter such as debug, or baletheus=debug,reqwest=trace", "It covers the libraries too."]),
    opt("log-format", &["LOG_FORMAT"], "FORMAT", "text", RUN, ALL,
        ["form of the log", "text or json", "json is one object a line."]),
    opt("listen", &["LISTEN_ADDRESS"], "ADDRESS", "", STATUS, LIST,
        ["address of the status endpoint; without it there is none", ADDRESS, "It has /metrics, /targets, /-/healthy, /-/ready and a page for people."]),
    opt("status-host", &["STATUS_HOSTS"], "HOST,…", "", STATUS, ALL,
        ["host names that the status endpoint and the tunnel answer to", "a comma-separated list such as status.example.org, or * for any", "IP addresses and names without a dot always work."]),
    opt("status-token-file", &["STATUS_TOKEN_FILE"], "PATH", "", STATUS, LIST,
        ["file with the token that the status endpoint asks for", "the path of a file with a token of at least 16 characters", "Clients send it as a bearer token, or as the password of any user."]),
    opt("device-refresh", &["DEVICE_REFRESH_RATE"], "DURATION", "60s", STATUS, LIST,
        ["time between two requests for the state of the devices", "a duration such as 60s, 1s to 30d", "Only with --listen."]),
    opt("device-services", &["DEVICE_SERVICES"], "", "true", STATUS, LIST,
        ["ask which services do not run on each device", BOOL, "It asks with every request for the state of the devices."]),
    opt("device-metrics", &["DEVICE_METRICS"], "", "false", STATUS, LIST,
        ["ask for memory, storage, CPU, temperature and under-voltage too", BOOL, "It asks about every five minutes, because supervisors report no more often."]),
    opt("tunnel-url", &["TUNNEL_URL"], "URL", "https://tunnel.balena-cloud.com", TUNNEL, ALL,
        ["URL of balena's VPN proxy", "a URL without a path", "For openBalena, it is https://tunnel.DOMAIN, or http:// in your own network."]),
    opt("listen", &["TUNNEL_LISTEN_ADDRESS"], "ADDRESS", "127.0.0.1:9798", TUNNEL, PROXY,
        ["address for Prometheus' proxy_url", ADDRESS, "It has /metrics and /-/healthy too."]),
];

const fn opt(
    flag: &'static str, vars: &'static [&'static str], value: &'static str, default: &'static str, group: &'static str,
    verbs: &'static [Verb], [short, takes, more]: [&'static str; 3],
) -> Opt {
    Opt { flag, vars, value, default, group, verbs, short, takes, more }
}

/// An option that a command takes, by its flag or else by its first variable.
///
/// # Panics
/// The command takes no such option: a mistake of the caller.
pub fn option(verb: Verb, name: &str) -> &'static Opt {
    let named = |opt: &&Opt| opt.verbs.contains(&verb) && (opt.flag == name || opt.vars[0] == name);
    OPTIONS.iter().find(named).expect("options are named as in the table")
}
