//! The table of options: every flag and variable, once, with the commands that take it.

use clap::{Arg, ArgAction, Command};

use crate::discovery::lan;

/// A command of the program.
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
    /// Its variables; more than one are names for the same thing. balena reserves `BALENA_*`: a fleet cannot set such a variable, and
    /// the supervisor may. So it counts only where no other name is set.
    pub vars: &'static [&'static str],
    /// Its value in the help. A boolean has none, and its flag needs no value. With `,…` the flag can be repeated.
    pub value: &'static str,
    /// Text of its default; empty if there is none.
    pub default: &'static str,
    /// Its heading in the help.
    pub group: &'static str,
    /// The commands that take it.
    pub verbs: &'static [Verb],
    /// What it means and takes, for the help and for messages.
    pub help: &'static str,
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

#[rustfmt::skip] // a table
/// Every option. The table in the README is checked against it.
pub const OPTIONS: &[Opt] = &[
    opt("", &["API_KEY"], "KEY", "", API, ALL, "named API key, required; never a flag, since the process list shows flags"),
    opt("api-key-file", &["API_KEY_FILE"], "PATH", "", API, ALL, "file that holds the key, instead of API_KEY"),
    opt("api-url", &["API_URL", "BALENA_API_URL"], "URL", "https://api.balena-cloud.com", API, LIST, "https URL of the API; for openBalena https://api.DOMAIN"),
    opt("ca-file", &["CA_FILE", "BALENA_CA_FILE"], "PATH", "", API, ALL, "file with additional root certificates (PEM), for an openBalena with its own CA"),
    opt("timeout", &["API_TIMEOUT"], "DURATION", "60s", API, LIST, "limit for a whole answer of the API, including its body; 1s to 1h"),
    opt("fleet", &["FLEET", "APPLICATION"], "FLEET,…", "", CHOICE, LIST, "only these fleets, with commas: slug (organization/name), id (all digits) or name"),
    opt("tag", &["DEVICE_TAG"], "KEY[=VALUE],…", "", CHOICE, LIST, "only devices with this tag, key or key=value, their own or their fleet's; repeated: all of them"),
    opt("online-only", &["ONLINE_ONLY"], "", "false", CHOICE, LIST, "true or false: leave out devices that balenaCloud sees offline"),
    opt("address", &["TARGET_ADDRESS"], "MODE", "vpn", TARGETS, LIST, "vpn, public or lan: how Prometheus reaches a device"),
    opt("", &["USE_PUBLIC_URLS"], "", "false", TARGETS, LIST, "true or false: true means TARGET_ADDRESS=public"),
    opt("exporter", &["EXPORTERS"], "[NAME:]PORT[/PATH],…", "80", TARGETS, LIST, "exporters of each device for which no tag and no service label names others, such as node:9100,app:8080/internal/metrics; or none"),
    opt("service-labels", &["SERVICE_LABELS"], "", "true", TARGETS, LIST, "true or false: read exporters from the service labels (prometheus.io.port and others) of the fleets' releases"),
    opt("own-tags", &["OWN_TAGS"], "MODE", "narrow", TARGETS, LIST, "narrow, all or off: what a device's own tags may change; narrow: only to fewer exporters and longer intervals than its fleet has"),
    opt("public-domain", &["PUBLIC_URL_DOMAIN"], "DOMAIN", "balena-devices.com", TARGETS, LIST, "domain of public device URLs"),
    opt("lan-network", &["LAN_NETWORKS"], "CIDR,…", lan::PRIVATE, TARGETS, LIST, "in lan: networks that devices are in, with commas; networks of this machine only if they, or parts of them, are named"),
    opt("labels", &["LABELS"], "LABELS", "all", TARGETS, LIST, "plain labels to attach, with commas, or all, or none; uuid always is"),
    opt("sd-file", &["SD_FILE_PATH"], "PATH", "balena.json", FILE, ALL, "path of the target file"),
    opt("sd-file-mode", &["SD_FILE_MODE"], "MODE", "0644", FILE, LIST, "octal permissions of the file, 0400 to 0777; Prometheus often runs as another user"),
    opt("write-empty", &["WRITE_EMPTY"], "", "false", FILE, LIST, "true or false: let a list of no targets replace one that has some"),
    opt("refresh", &["REFRESH_RATE"], "DURATION", "30s", RUN, LIST, "time between two refreshes, such as 45s or 2m; 1s to 30d; a bare number is milliseconds"),
    opt("oneshot", &["ONESHOT"], "", "false", RUN, LIST, "true or false: one refresh, then exit"),
    opt("dry-run", &["DRY_RUN"], "", "false", RUN, LIST, "true or false: one refresh, the list to standard output, no file touched"),
    opt("log-level", &["LOG_LEVEL"], "LEVEL", "info", RUN, ALL, "off, error, warn, info, debug or trace"),
    opt("", &["RUST_LOG"], "FILTER", "", RUN, ALL, "a filter that wins over the log level and covers the libraries: debug, or baletheus=debug,reqwest=trace"),
    opt("log-format", &["LOG_FORMAT"], "FORMAT", "text", RUN, ALL, "text, or json: one object a line"),
    opt("listen", &["LISTEN_ADDRESS"], "ADDRESS", "", STATUS, LIST, "host:port for /metrics, /-/healthy, /-/ready, /targets and a page for people; :PORT for all interfaces; off if empty"),
    opt("status-host", &["STATUS_HOSTS"], "HOST,…", "", STATUS, ALL, "host names that the status endpoint and the tunnel answer to, such as status.example.org; * for any; IP addresses and names without a dot always work"),
    opt("status-token-file", &["STATUS_TOKEN_FILE"], "PATH", "", STATUS, LIST, "file with a token of at least 16 characters that --listen asks for: a bearer token, or the password of any user"),
    opt("device-refresh", &["DEVICE_REFRESH_RATE"], "DURATION", "60s", STATUS, LIST, "time between two requests for the state of the devices, with --listen; 1s to 30d"),
    opt("device-services", &["DEVICE_SERVICES"], "", "true", STATUS, LIST, "true or false: ask which services do not run on each device, with every request for its state"),
    opt("device-metrics", &["DEVICE_METRICS"], "", "false", STATUS, LIST, "true or false: ask for memory, storage, CPU, temperature and under-voltage as well, with every fifth request or every 5 minutes"),
    opt("tunnel-url", &["TUNNEL_URL"], "URL", "https://tunnel.balena-cloud.com", TUNNEL, ALL, "URL of balena's VPN proxy, for tunnel, and for check in vpn; for openBalena https://tunnel.DOMAIN, or http:// inside your own network"),
    opt("listen", &["TUNNEL_LISTEN_ADDRESS"], "ADDRESS", "127.0.0.1:9798", TUNNEL, PROXY, "baletheus tunnel: host:port for Prometheus' proxy_url, for /metrics and /-/healthy too; :PORT for all interfaces"),
];

const fn opt(
    flag: &'static str, vars: &'static [&'static str], value: &'static str, default: &'static str, group: &'static str,
    verbs: &'static [Verb], help: &'static str,
) -> Opt {
    Opt { flag, vars, value, default, group, verbs, help }
}

/// The command line.
pub fn command() -> Command {
    let check = Command::new("check")
        .about("Tries each target as Prometheus would and reports why one does not answer")
        .after_help(after_help(
            Verb::Check,
            "0 every target that should answer does, 1 one does not or the API fails, 2 it cannot start",
        ))
        .next_line_help(true)
        .arg(
            Arg::new("json")
                .long("json")
                .action(ArgAction::SetTrue)
                .help("one JSON array of objects instead of a table"),
        )
        .args(flags(Verb::Check));
    let tunnel = Command::new("tunnel")
        .about("Proxies Prometheus' scrapes of vpn targets through balena's VPN: its URL is Prometheus' proxy_url")
        .after_help(after_help(Verb::Tunnel, "0 ended by a signal, 2 it cannot start"))
        .next_line_help(true)
        .args(flags(Verb::Tunnel));
    let health = Command::new("health")
        .about("Asks a running sidecar whether it is healthy, for a container's HEALTHCHECK")
        .after_help("Exit codes: 0 healthy, 1 not healthy or no answer, 2 no URL.\n")
        .next_line_help(true)
        .arg(
            Arg::new("url")
                .value_name("URL")
                .help("its status endpoint, such as http://127.0.0.1:9797 [default: from LISTEN_ADDRESS]"),
        );
    Command::new("baletheus")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Finds every device of a balena fleet and keeps Prometheus' target file up to date")
        .next_line_help(true)
        .after_help(after_help(
            Verb::Discover,
            "0 ended by a signal or done, 1 a single refresh failed, 2 it cannot start",
        ))
        .args(flags(Verb::Discover))
        .args_conflicts_with_subcommands(true)
        .subcommands([check, health, tunnel])
}

fn flags(verb: Verb) -> impl Iterator<Item = Arg> {
    OPTIONS.iter().filter(move |opt| opt.verbs.contains(&verb) && !opt.flag.is_empty()).map(flag)
}

fn flag(opt: &'static Opt) -> Arg {
    let help = format!("{} [env: {}]{}", opt.help, opt.vars.join(", "), default(opt));
    let arg = Arg::new(opt.flag).long(opt.flag).help(help).help_heading(opt.group);
    match opt.value.trim_end_matches(",…") {
        "" => arg.value_name("BOOL").num_args(0..=1).require_equals(true).default_missing_value("true"),
        value => arg.value_name(value).action(if value == opt.value { ArgAction::Set } else { ArgAction::Append }),
    }
}

fn after_help(verb: Verb, exit_codes: &str) -> String {
    let variables = OPTIONS.iter().filter(|opt| opt.flag.is_empty() && opt.verbs.contains(&verb));
    let lines: Vec<_> = variables.map(|opt| format!("  {:<16} {}{}", opt.vars[0], opt.help, default(opt))).collect();
    format!(
        "Variables without a flag:\n{}\n\nA flag beats its variable; an empty variable counts as not set.\n\
         Exit codes: {exit_codes}.\n",
        lines.join("\n")
    )
}

fn default(opt: &Opt) -> String {
    if opt.default.is_empty() { String::new() } else { format!(" [default: {}]", opt.default) }
}

/// An option that a command takes, by its flag or else by its first variable.
///
/// # Panics
/// The command takes no such option: a mistake of the caller.
pub fn option(verb: Verb, name: &str) -> &'static Opt {
    let named = |opt: &&Opt| opt.verbs.contains(&verb) && (opt.flag == name || opt.vars[0] == name);
    OPTIONS.iter().find(named).expect("options are named as in the table")
}
