//! Flags and variables: every option written once, and read without being judged yet.

use std::ffi::OsString;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

/// An option: a flag, one or more variables, or both.
pub struct Opt {
    /// Its flag without the dashes; empty if it is a variable only.
    pub flag: &'static str,
    /// Its variables; more than one are names for the same thing.
    pub vars: &'static [&'static str],
    /// Its value in the help. A boolean has none, and its flag may stand alone; with `,` the flag may be repeated.
    pub value: &'static str,
    /// Text of its default; empty if there is none.
    pub default: &'static str,
    /// Its heading in the help.
    pub group: &'static str,
    /// What it means and takes, for the help and for messages.
    pub help: &'static str,
}

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
    opt("", &["API_KEY"], "KEY", "", API, "named API key, required; never a flag, since flags stand in the process list"),
    opt("api-key-file", &["API_KEY_FILE"], "PATH", "", API, "file that holds the key, instead of API_KEY"),
    opt("api-url", &["BALENA_API_URL"], "URL", "https://api.balena-cloud.com", API, "https URL of the API; for openBalena https://api.DOMAIN"),
    opt("ca-file", &["BALENA_CA_FILE"], "PATH", "", API, "file of further root certificates (PEM), for openBalena's own CA"),
    opt("timeout", &["API_TIMEOUT"], "DURATION", "60s", API, "for a whole answer of the API, its body included; 1s to 1h"),
    opt("fleet", &["FLEET", "APPLICATION"], "FLEET,…", "", CHOICE, "only these fleets, with commas: slug (organization/name), id (all digits) or name"),
    opt("tag", &["DEVICE_TAG"], "KEY[=VALUE],…", "", CHOICE, "only devices with this tag, key or key=value, of their own or their fleet's; repeated: with all of them"),
    opt("online-only", &["ONLINE_ONLY"], "", "false", CHOICE, "true or false: leave out devices that balenaCloud sees offline"),
    opt("address", &["TARGET_ADDRESS"], "MODE", "vpn", TARGETS, "vpn, public or lan: how Prometheus reaches a device"),
    opt("", &["USE_PUBLIC_URLS"], "", "false", TARGETS, "true or false: true means TARGET_ADDRESS=public"),
    opt("exporter", &["EXPORTERS"], "[NAME:]PORT[/PATH],…", "80", TARGETS, "what to scrape on each device, such as node:9100,app:8080/internal/metrics"),
    opt("public-domain", &["PUBLIC_URL_DOMAIN"], "DOMAIN", "balena-devices.com", TARGETS, "domain of public device URLs"),
    opt("labels", &["LABELS"], "LABELS", "all", TARGETS, "plain labels to attach, with commas, or all, or none; uuid always is"),
    opt("sd-file", &["SD_FILE_PATH"], "PATH", "balena.json", FILE, "path of the target file"),
    opt("sd-file-mode", &["SD_FILE_MODE"], "MODE", "0644", FILE, "octal permissions of the file, 0400 to 0777; Prometheus often runs as another user"),
    opt("write-empty", &["WRITE_EMPTY"], "", "false", FILE, "true or false: let a list of no targets replace one that has some"),
    opt("refresh", &["REFRESH_RATE"], "DURATION", "30s", RUN, "from one refresh to the next, such as 45s or 2m, 1s to 30d; a bare number is milliseconds"),
    opt("oneshot", &["ONESHOT"], "", "false", RUN, "true or false: one refresh, then exit"),
    opt("dry-run", &["DRY_RUN"], "", "false", RUN, "true or false: one refresh, the list to standard output, no file touched"),
    opt("log-level", &["LOG_LEVEL"], "LEVEL", "info", RUN, "off, error, warn, info, debug or trace"),
    opt("", &["RUST_LOG"], "FILTER", "", RUN, "beats the log level and covers the libraries: debug, or baletheus=debug,reqwest=trace"),
    opt("log-format", &["LOG_FORMAT"], "FORMAT", "text", RUN, "text, or json: one object a line"),
    opt("listen", &["LISTEN_ADDRESS"], "ADDRESS", "", STATUS, "host:port for /metrics, /-/healthy, /-/ready, /targets and a page for people; :PORT for all interfaces; off if empty"),
    opt("device-refresh", &["DEVICE_REFRESH_RATE"], "DURATION", "60s", STATUS, "from one request for the state of the devices to the next, where --listen is on; 1s to 30d"),
    opt("device-metrics", &["DEVICE_METRICS"], "", "false", STATUS, "true or false: ask for memory, storage, CPU, temperature and under-voltage as well"),
    opt("tunnel-url", &["TUNNEL_URL"], "URL", "https://tunnel.balena-cloud.com", TUNNEL, "URL of balena's VPN proxy, for tunnel, and for check in vpn; for openBalena https://tunnel.DOMAIN, or http:// inside one's own network"),
    opt("listen", &["TUNNEL_LISTEN_ADDRESS"], "ADDRESS", "127.0.0.1:9798", TUNNEL, "of baletheus tunnel: host:port that Prometheus has as proxy_url, for /metrics and /-/healthy too; :PORT for all interfaces"),
];

const fn opt(
    flag: &'static str, vars: &'static [&'static str], value: &'static str, default: &'static str, group: &'static str,
    help: &'static str,
) -> Opt {
    Opt { flag, vars, value, default, group, help }
}

/// The command line.
pub fn command() -> Command {
    let variables = OPTIONS.iter().filter(|opt| opt.flag.is_empty());
    let lines: Vec<_> = variables.map(|opt| format!("  {:<16} {}{}", opt.vars[0], opt.help, default(opt))).collect();
    Command::new("baletheus")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Finds every device of a balena fleet and keeps Prometheus' list of targets true")
        .next_line_help(true)
        .after_help(format!(
            "Variables without a flag:\n{}\n\nA flag beats its variable; an empty one counts as not set.\n\
             Exit codes: 0 ended by a signal or done, 1 a single refresh failed, 2 configuration.\n",
            lines.join("\n")
        ))
        .args(args())
        .args_conflicts_with_subcommands(true)
}

fn default(opt: &Opt) -> String {
    if opt.default.is_empty() { String::new() } else { format!(" [default: {}]", opt.default) }
}

/// The flags of discovery.
pub fn args() -> impl Iterator<Item = Arg> {
    OPTIONS.iter().filter(|opt| !opt.flag.is_empty() && opt.vars[0] != "TUNNEL_LISTEN_ADDRESS").map(arg)
}

/// The flag of an option.
pub fn arg(opt: &'static Opt) -> Arg {
    let help = format!("{} [env: {}]{}", opt.help, opt.vars.join(", "), default(opt));
    let arg = Arg::new(opt.flag).long(opt.flag).help(help).help_heading(opt.group);
    match opt.value.trim_end_matches(",…") {
        "" => arg.value_name("BOOL").num_args(0..=1).require_equals(true).default_missing_value("true"),
        value => arg.value_name(value).action(if value == opt.value { ArgAction::Set } else { ArgAction::Append }),
    }
}

/// Where values come from, and what was wrong with them so far.
pub struct Values<'a> {
    /// What clap read.
    pub matches: ArgMatches,
    /// The environment.
    pub var: &'a dyn Fn(&str) -> Option<OsString>,
    /// One line each, for the user.
    pub errors: Vec<String>,
}

impl Values<'_> {
    /// Where an option was given, and what; an empty value counts as not given.
    pub fn given(&mut self, name: &str) -> Option<(String, Vec<String>)> {
        let opt = option(name);
        if !opt.flag.is_empty() && self.matches.value_source(opt.flag) == Some(ValueSource::CommandLine) {
            let values = self.matches.get_many::<String>(opt.flag).into_iter().flatten();
            let values: Vec<_> = values.filter(|value| !value.is_empty()).cloned().collect();
            return (!values.is_empty()).then(|| (format!("--{}", opt.flag), values));
        }
        let set: Vec<_> = opt.vars.iter().filter_map(|name| Some((*name, (self.var)(name)?))).collect();
        let mut set = set.into_iter().filter(|(_, value)| !value.is_empty());
        let (name, value) = set.next()?;
        if let Some((other, _)) = set.find(|(_, other)| *other != value) {
            self.errors.push(format!("{name} and {other} are set to different values: set one of them"));
        }
        let value = value.into_string().map_err(|_| self.errors.push(format!("{name} is not UTF-8")));
        Some((name.into(), vec![value.ok()?]))
    }

    /// An option without a default: each of its values is read.
    pub fn all<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let Some((source, values)) = self.given(name) else { return Vec::new() };
        let mut read_or_tell = |text: &String| {
            let tell = |error| {
                // a URL may have a password or a key in it
                let is_secret = text.contains("://") && text.contains(['@', '?']);
                let shown = if is_secret { "not shown".into() } else { format!("{text:?}") };
                self.errors.push(format!("{source} is {shown}: {error}; it takes: {}", option(name).help));
            };
            read(text).map_err(tell).ok()
        };
        values.iter().filter_map(&mut read_or_tell).collect()
    }

    /// An option whose values are lists, all of which make one.
    pub fn list<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<Vec<T>, String>) -> Vec<T> {
        let list: Vec<T> = self.all(name, &read).into_iter().flatten().collect();
        if list.is_empty() { read(option(name).default).unwrap_or_default() } else { list }
    }

    /// An option with a default, which also stands in for a value that cannot be read.
    ///
    /// # Panics
    /// If the default cannot be read: a mistake in the table.
    pub fn one<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> T {
        self.all(name, &read).pop().unwrap_or_else(|| read(option(name).default).expect("defaults can be read"))
    }
}

/// By its flag, or else by its first variable.
///
/// # Panics
/// If there is none: a mistake of the caller.
pub fn option(name: &str) -> &'static Opt {
    let named = |opt: &&Opt| opt.flag == name || opt.vars[0] == name;
    OPTIONS.iter().find(named).expect("options are named as in the table")
}

/// The items of a list with commas; empty ones are passed over.
pub fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// true/false, 1/0, yes/no, on/off, in any case.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err("not a boolean (true/false, 1/0, yes/no, on/off)".into()),
    }
}

/// One of a few words.
pub fn one_of<T: Copy, const N: usize>(text: &str, known: [(&str, T); N]) -> Result<T, String> {
    known.iter().find(|(name, _)| *name == text.trim()).map(|(_, value)| *value).ok_or_else(|| "no such choice".into())
}

/// An interval: a duration, or a bare number of milliseconds.
pub fn refresh(text: &str) -> Result<Duration, String> {
    let (text, longest) = (text.trim(), 30 * 86400);
    let is_bare = text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        // the first baletheus had milliseconds without a unit
        Ok(0..1000_u32) => Err("a bare number is milliseconds; write a unit, such as 30s".into()),
        _ if is_bare => duration(&format!("{text}ms"), longest),
        _ => duration(text, longest),
    }
}

/// From a second up to `longest` seconds.
pub fn duration(text: &str, longest: u64) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text.trim()).map_err(|_| "not a duration with its unit, such as 60s")?;
    let range = Duration::from_secs(1)..=Duration::from_secs(longest);
    range.contains(&duration).then_some(duration).ok_or("out of range".into())
}
