//! Flags and environment → a checked [`Config`]. Every option is written once, in [`OPTIONS`]; all errors come at once.

use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use log::LevelFilter;
use reqwest::{Certificate, Url};

use crate::exporter::{self, Exporter};
use crate::query::{self, FleetRef};
use crate::tag::TagFilter;
use crate::target::{Address, PLAIN, Rules, UUID};

/// An option: a flag, one or more variables, or both.
pub struct Opt {
    /// Its flag without the dashes; empty if it is a variable only.
    pub flag: &'static str,
    /// Its variables; more than one are names for the same thing.
    pub vars: &'static [&'static str],
    /// Its value in the help; empty for a boolean, whose flag may stand alone.
    pub value: &'static str,
    /// Text of its default; empty if there is none.
    pub default: &'static str,
    /// Whether the flag may be given several times.
    pub many: bool,
    /// Its heading in the help.
    pub group: &'static str,
    /// What it means.
    pub help: &'static str,
    /// What it takes, for messages.
    takes: &'static str,
}

const API: &str = "balena API";
const CHOICE: &str = "Which devices";
const TARGETS: &str = "Targets";
const FILE: &str = "Target file";
const LOOP: &str = "Running";
const BOOLEAN: &str = "true/false, 1/0, yes/no or on/off";

#[rustfmt::skip] // a table
/// Every option. The table in the README is checked against it.
pub const OPTIONS: &[Opt] = &[
    Opt { flag: "", vars: &["API_KEY"], value: "KEY", default: "", many: false, group: API,
        help: "named API key, required; never a flag, since flags stand in the process list", takes: "a named API key" },
    Opt { flag: "api-key-file", vars: &["API_KEY_FILE"], value: "PATH", default: "", many: false, group: API,
        help: "file that holds the key, instead of API_KEY", takes: "a path" },
    Opt { flag: "api-url", vars: &["BALENA_API_URL"], value: "URL", default: "https://api.balena-cloud.com", many: false, group: API,
        help: "for openBalena: https://api.<its domain>", takes: "an http or https URL without user, query or fragment" },
    Opt { flag: "ca-file", vars: &["BALENA_CA_FILE"], value: "PATH", default: "", many: false, group: API,
        help: "further root certificates (PEM), for openBalena's own CA", takes: "a file of PEM certificates" },
    Opt { flag: "timeout", vars: &["API_TIMEOUT"], value: "DURATION", default: "60s", many: false, group: API,
        help: "for a whole answer of the API, its body included", takes: "a duration from 1s to 1h such as 60s" },
    Opt { flag: "fleet", vars: &["FLEET", "APPLICATION"], value: "FLEET", default: "", many: true, group: CHOICE,
        help: "only this fleet: slug (org/name), id (all digits) or name; several: any of them", takes: "slugs (org/name), ids or names, with commas" },
    Opt { flag: "tag", vars: &["DEVICE_TAG"], value: "KEY[=VALUE]", default: "", many: true, group: CHOICE,
        help: "only devices with this tag, their own or their fleet's; several: all of them", takes: "key or key=value; a key has 1 to 100 characters and no white space" },
    Opt { flag: "online-only", vars: &["ONLINE_ONLY"], value: "", default: "false", many: false, group: CHOICE,
        help: "leave out devices that balenaCloud sees offline", takes: BOOLEAN },
    Opt { flag: "address", vars: &["TARGET_ADDRESS"], value: "MODE", default: "vpn", many: false, group: TARGETS,
        help: "how Prometheus reaches a device: vpn, public or lan", takes: "vpn, public or lan" },
    Opt { flag: "", vars: &["USE_PUBLIC_URLS"], value: "", default: "false", many: false, group: TARGETS,
        help: "true means TARGET_ADDRESS=public", takes: BOOLEAN },
    Opt { flag: "exporter", vars: &["EXPORTERS"], value: "[NAME:]PORT[/PATH]", default: "80", many: true, group: TARGETS,
        help: "what to scrape on each device, such as node:9100", takes: exporter::TAKES },
    Opt { flag: "public-domain", vars: &["PUBLIC_URL_DOMAIN"], value: "DOMAIN", default: "balena-devices.com", many: false, group: TARGETS,
        help: "domain of public device URLs", takes: "a domain name" },
    Opt { flag: "labels", vars: &["LABELS"], value: "LABELS", default: "all", many: false, group: TARGETS,
        help: "plain labels to attach, with commas; all or none; uuid always is", takes: "all, none, or names of plain labels with commas" },
    Opt { flag: "sd-file", vars: &["SD_FILE_PATH"], value: "PATH", default: "balena.json", many: false, group: FILE,
        help: "the target file", takes: "a path to a file" },
    Opt { flag: "sd-file-mode", vars: &["SD_FILE_MODE"], value: "MODE", default: "0644", many: false, group: FILE,
        help: "its permissions; Prometheus often runs as another user", takes: "octal permissions from 0400 to 0777 which let the owner read" },
    Opt { flag: "write-empty", vars: &["WRITE_EMPTY"], value: "", default: "false", many: false, group: FILE,
        help: "let a list of no targets replace one that has some", takes: BOOLEAN },
    Opt { flag: "refresh", vars: &["REFRESH_RATE"], value: "DURATION", default: "30s", many: false, group: LOOP,
        help: "from one refresh to the next; a bare number is milliseconds", takes: "a duration from 1s to 30d such as 45s or 2m, or milliseconds" },
    Opt { flag: "oneshot", vars: &["ONESHOT"], value: "", default: "false", many: false, group: LOOP,
        help: "one refresh, then exit", takes: BOOLEAN },
    Opt { flag: "dry-run", vars: &["DRY_RUN"], value: "", default: "false", many: false, group: LOOP,
        help: "one refresh, the list to standard output, no file touched", takes: BOOLEAN },
    Opt { flag: "log-level", vars: &["LOG_LEVEL"], value: "LEVEL", default: "info", many: false, group: LOOP,
        help: "off, error, warn, info, debug or trace", takes: "off, error, warn, info, debug or trace" },
    Opt { flag: "", vars: &["RUST_LOG"], value: "FILTER", default: "", many: false, group: LOOP,
        help: "beats the log level, and tells of the libraries too", takes: "filters such as debug or baletheus=debug,reqwest=trace" },
    Opt { flag: "log-format", vars: &["LOG_FORMAT"], value: "FORMAT", default: "text", many: false, group: LOOP,
        help: "text, or json: one object a line", takes: "text or json" },
];

/// All that the program is told from outside, checked.
#[derive(Debug)]
pub struct Config {
    /// Where the API is and how to ask it.
    pub api: Api,
    /// Fleets to ask for; none means all that the key sees.
    pub fleets: Vec<FleetRef>,
    /// What makes targets of devices.
    pub rules: Rules,
    /// The target file.
    pub file: File,
    /// From the start of one refresh to the start of the next.
    pub refresh: Duration,
    /// How long it runs, and where the list goes.
    pub mode: Mode,
    /// What it tells.
    pub log: Log,
    /// What is allowed but looks like a mistake; told once at the start.
    pub warnings: Vec<String>,
}

/// How the API is reached.
#[derive(Debug)]
pub struct Api {
    /// Base URL without a trailing slash.
    pub url: String,
    /// The key, and where it came from.
    pub key: ApiKey,
    /// The file that held it, if it was one.
    pub key_file: Option<PathBuf>,
    /// Roots beside the platform's.
    pub roots: Vec<Certificate>,
    /// For a whole answer, its body included.
    pub timeout: Duration,
}

/// How the target file is written.
#[derive(Debug)]
pub struct File {
    /// Its path.
    pub path: PathBuf,
    /// Its permissions.
    pub mode: u32,
    /// Whether a list of no targets may replace one that has some.
    pub write_empty: bool,
}

/// How long the program runs, and where the list goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Until a signal ends it.
    Loop,
    /// One refresh.
    Oneshot,
    /// One refresh to standard output.
    DryRun,
}

/// What the log holds, and in which form.
#[derive(Debug)]
pub struct Log {
    /// How much the program itself tells.
    pub level: LevelFilter,
    /// `RUST_LOG`, checked, if it is set.
    pub filter: Option<String>,
    /// One JSON object a line instead of text.
    pub json: bool,
}

/// A key that never prints.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// Checks a key; the error never shows it.
    pub fn new(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if let Some(at) = text.bytes().position(|b| !b.is_ascii_graphic()) {
            let what = "a line break, a blank or a character that is not ASCII";
            return Err(format!("holds {what} after {at} characters; copy the key again"));
        }
        if text.is_empty() { Err("is empty".into()) } else { Ok(ApiKey(text.to_owned())) }
    }

    /// Reads it from a file of at most 4 KiB.
    pub fn read(path: &Path) -> Result<Self, String> {
        let mut text = String::new();
        let read = std::fs::File::open(path).and_then(|file| file.take(4096).read_to_string(&mut text));
        read.map_err(|error| format!("cannot be read: {error}"))?;
        Self::new(&text)
    }

    /// The secret itself, for the request.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Asked {
    /// To run.
    Run(Box<Config>),
    /// Help, version, or a command line that clap cannot read: its own text and exit code.
    Told(clap::Error),
}

/// The command line, for its help.
pub fn command() -> Command {
    let only_vars = OPTIONS.iter().filter(|opt| opt.flag.is_empty());
    let only_vars: Vec<_> = only_vars.map(|opt| format!("  {:<28}{}", opt.vars.join(", "), opt.help)).collect();
    let flags = OPTIONS.iter().filter(|opt| !opt.flag.is_empty()).map(|opt| {
        let default = if opt.default.is_empty() { String::new() } else { format!(" [default: {}]", opt.default) };
        let help = format!("{} [env: {}]{default}", opt.help, opt.vars.join(", "));
        let arg = Arg::new(opt.flag).long(opt.flag).help(help).help_heading(opt.group);
        match opt.value {
            "" => arg.value_name("BOOL").num_args(0..=1).require_equals(true).default_missing_value("true"),
            value => arg.value_name(value).action(if opt.many { ArgAction::Append } else { ArgAction::Set }),
        }
    });
    Command::new("baletheus")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Finds every device of a balena fleet and keeps Prometheus' list of targets true")
        .after_help(format!(
            "Variables without a flag:\n{}\n\nA flag beats its variable; an empty one counts as not set.\n\
             Exit codes: 0 ended by a signal or done, 1 a single refresh failed, 2 configuration.",
            only_vars.join("\n")
        ))
        .args(flags)
}

/// Reads flags (the first is the program's name) and variables; errors are for the user, one a mistake.
pub fn read(
    args: impl IntoIterator<Item = OsString>,
    var: &dyn Fn(&str) -> Option<OsString>,
) -> Result<Asked, Vec<String>> {
    match command().try_get_matches_from(args) {
        Err(told) => Ok(Asked::Told(told)),
        Ok(matches) => judge(Sources { matches, var, errors: Vec::new() }).map(|config| Asked::Run(Box::new(config))),
    }
}

fn judge(mut from: Sources) -> Result<Config, Vec<String>> {
    let mut warnings = Vec::new();
    let (key, key_file) = from.key();
    let url = from.value("api-url", api_url);
    if url.scheme() == "http" && !is_loopback(&url) {
        warnings.push(format!("the API key travels unencrypted to {url}: use https"));
    }
    let roots = from.optional("ca-file", certificates).unwrap_or_default();
    let address = from.address();
    let exporters = from.value("exporter", |text| exporters(text, address));
    if address == Address::Public {
        for exporter in exporters.iter().filter(|exporter| exporter.port != 80) {
            let port = exporter.port;
            warnings.push(format!("exporter {exporter}: a public device URL leads to port 80, {port} is not used"));
        }
    }
    let rules = Rules {
        address,
        exporters,
        public_domain: from.value("public-domain", domain),
        labels: from.value("labels", labels),
        online_only: from.value("online-only", boolean),
        tags: from.all("tag", TagFilter::parse),
    };
    let fleets = from.optional("fleet", fleets).unwrap_or_default();
    if let Err(error) = query::check(&fleets, &rules.tags) {
        from.errors.push(error);
    }
    let path = from.value("sd-file", file_path);
    if !path.extension().is_some_and(|end| ["json", "yml", "yaml"].iter().any(|known| end.eq_ignore_ascii_case(known)))
    {
        let path = path.display();
        warnings.push(format!("{path}: Prometheus reads only files whose names end in .json, .yml or .yaml"));
    }
    let file = File { path, mode: from.value("sd-file-mode", mode), write_empty: from.value("write-empty", boolean) };
    let (oneshot, dry_run) = (from.value("oneshot", boolean), from.value("dry-run", boolean));
    let config = Config {
        api: Api {
            url: url.as_str().trim_end_matches('/').to_owned(),
            key,
            key_file,
            roots,
            timeout: from.value("timeout", |text| duration(text, Duration::from_secs(3600))),
        },
        fleets,
        rules,
        file,
        refresh: from.value("refresh", refresh),
        mode: if dry_run {
            Mode::DryRun
        } else if oneshot {
            Mode::Oneshot
        } else {
            Mode::Loop
        },
        log: Log {
            level: from.value("log-level", |text| text.parse().map_err(|_| String::new())),
            filter: from.optional("RUST_LOG", log_filter),
            json: from.value("log-format", |text| match text {
                "text" => Ok(false),
                "json" => Ok(true),
                _ => Err(String::new()),
            }),
        },
        warnings,
    };
    if from.errors.is_empty() { Ok(config) } else { Err(from.errors) }
}

/// Where values come from, and what was wrong with them so far.
struct Sources<'a> {
    matches: ArgMatches,
    var: &'a dyn Fn(&str) -> Option<OsString>,
    errors: Vec<String>,
}

impl Sources<'_> {
    /// Where an option was given, and what; an empty value counts as not given.
    fn given(&mut self, opt: &Opt) -> Option<(String, Vec<String>)> {
        if !opt.flag.is_empty() && self.matches.value_source(opt.flag) == Some(ValueSource::CommandLine) {
            let values = self.matches.get_many::<String>(opt.flag).into_iter().flatten();
            let values: Vec<_> = values.filter(|value| !value.is_empty()).cloned().collect();
            return (!values.is_empty()).then(|| (format!("--{}", opt.flag), values));
        }
        let mut set = Vec::new();
        for name in opt.vars {
            match (self.var)(name).map(OsString::into_string) {
                Some(Ok(value)) if !value.is_empty() => set.push(((*name).to_owned(), vec![value])),
                Some(Err(_)) => self.errors.push(format!("{name} is not UTF-8; it takes {}", opt.takes)),
                _ => {}
            }
        }
        if set.windows(2).any(|pair| pair[0].1 != pair[1].1) {
            self.errors.push(format!("{} are set to different values: set one of them", opt.vars.join(" and ")));
        }
        set.into_iter().next()
    }

    fn parse<T>(
        &mut self,
        opt: &Opt,
        source: &str,
        text: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        parse(text)
            .map_err(|error| {
                // a URL with a password in it
                let shown = if text.contains('@') { "not shown".into() } else { format!("{text:?}") };
                let colon = if error.is_empty() { "" } else { ": " };
                self.errors.push(format!("{source} is {shown}{colon}{error}; it takes {}", opt.takes));
            })
            .ok()
    }

    /// An option without a default. Values of a repeated flag are read as one list.
    fn optional<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let opt = option(name);
        let (source, values) = self.given(opt)?;
        let text = if opt.many { values.join(",") } else { values.last()?.clone() };
        self.parse(opt, &source, &text, parse)
    }

    /// An option with a default, which also stands in for a value that cannot be read.
    fn value<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> T {
        let default = option(name).default;
        self.optional(name, &parse).unwrap_or_else(|| parse(default).expect("defaults can be read"))
    }

    /// An option whose values may hold commas: each value for itself.
    fn all<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let opt = option(name);
        let (source, values) = self.given(opt).unwrap_or_default();
        values.iter().filter_map(|text| self.parse(opt, &source, text, &parse)).collect()
    }

    fn key(&mut self) -> (ApiKey, Option<PathBuf>) {
        let (direct, file) = (self.given(option("API_KEY")), self.given(option("api-key-file")));
        let key = match (&direct, &file) {
            (Some(_), Some((source, _))) => Err(format!("API_KEY and {source} are both set: set one of them")),
            (Some((source, values)), None) => ApiKey::new(&values[0]).map_err(|error| format!("{source} {error}")),
            (None, Some((source, values))) => ApiKey::read(Path::new(&values[0]))
                .map_err(|error| format!("{source} is {:?}: the file {error}", values[0])),
            (None, None) => Err("API_KEY is not set: create a named API key in balenaCloud's dashboard (Preferences, \
                 Access tokens) and set API_KEY to it, or API_KEY_FILE to a file that holds it"
                .into()),
        };
        let key = key.unwrap_or_else(|error| {
            self.errors.push(error);
            ApiKey(String::new())
        });
        (key, file.map(|(_, values)| PathBuf::from(&values[0])))
    }

    fn address(&mut self) -> Address {
        let chosen = self.given(option("address")).is_some();
        let address = self.value("address", |text| match text {
            "vpn" => Ok(Address::Vpn),
            "public" => Ok(Address::Public),
            "lan" => Ok(Address::Lan),
            _ => Err(String::new()),
        });
        if !self.value("USE_PUBLIC_URLS", boolean) {
            return address;
        }
        if chosen && address != Address::Public {
            self.errors.push("USE_PUBLIC_URLS is true, but TARGET_ADDRESS is not public: set one of them".into());
        }
        Address::Public
    }
}

fn option(name: &str) -> &'static Opt {
    let named = |opt: &&Opt| opt.flag == name || opt.flag.is_empty() && opt.vars[0] == name;
    OPTIONS.iter().find(named).expect("options are named as in the table")
}

/// true/false, 1/0, yes/no, on/off, in any case.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err("is not a boolean".into()),
    }
}

fn api_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text.trim()).map_err(|error| error.to_string())?;
    let bare =
        url.query().is_none() && url.fragment().is_none() && url.username().is_empty() && url.password().is_none();
    if matches!(url.scheme(), "http" | "https") && url.has_host() && bare { Ok(url) } else { Err(String::new()) }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn certificates(path: &str) -> Result<Vec<Certificate>, String> {
    let pem = std::fs::read(path).map_err(|error| format!("the file cannot be read: {error}"))?;
    let roots = Certificate::from_pem_bundle(&pem).map_err(|_| "the file is not PEM")?;
    if roots.is_empty() { Err("the file holds no certificate".into()) } else { Ok(roots) }
}

fn exporters(text: &str, address: Address) -> Result<Vec<Exporter>, String> {
    let list = exporter::parse_list(text)?;
    for (index, exporter) in list.iter().enumerate() {
        // To Prometheus a target is its job and its address; all of a device's public URLs are one address.
        let same = |other: &&Exporter| {
            other.name == exporter.name && (address == Address::Public || other.port == exporter.port)
        };
        if let Some(other) = list[..index].iter().find(same) {
            return Err(format!("{other} and {exporter} are the same target to Prometheus; give each its own name"));
        }
    }
    Ok(list)
}

fn domain(text: &str) -> Result<String, String> {
    let is_part = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if text.len() <= 190 && text.split('.').all(is_part) { Ok(text.to_ascii_lowercase()) } else { Err(String::new()) }
}

fn labels(text: &str) -> Result<Vec<&'static str>, String> {
    let known = || PLAIN.iter().map(|label| label.name);
    match text.trim() {
        "all" => return Ok(known().collect()),
        "none" => return Ok(vec![UUID]),
        _ => {}
    }
    let named = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    let find = |name| known().find(|known| *known == name);
    named
        .map(|name| {
            find(name).ok_or_else(|| format!("no label {name:?}, there are {}", known().collect::<Vec<_>>().join(", ")))
        })
        .collect()
}

fn fleets(text: &str) -> Result<Vec<FleetRef>, String> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(FleetRef::parse).collect()
}

fn file_path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if text.ends_with('/') || path.file_name().is_none() || path.is_dir() {
        return Err("names a directory".into());
    }
    Ok(path)
}

fn mode(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let mode = u32::from_str_radix(digits, 8).map_err(|error| error.to_string())?;
    if (0o400..=0o777).contains(&mode) && mode & 0o400 != 0 { Ok(mode) } else { Err(String::new()) }
}

fn refresh(text: &str) -> Result<Duration, String> {
    let longest = Duration::from_secs(30 * 86400);
    let text = text.trim();
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return duration(text, longest);
    }
    // the first baletheus had milliseconds without a unit
    match text.parse() {
        Ok(millis @ 1000..) if Duration::from_millis(millis) <= longest => Ok(Duration::from_millis(millis)),
        Ok(0..1000) => Err("a bare number is milliseconds; write a unit, such as 30s".into()),
        _ => Err("out of range".into()),
    }
}

fn duration(text: &str, longest: Duration) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text.trim()).map_err(|error| error.to_string())?;
    let range = Duration::from_secs(1)..=longest;
    if range.contains(&duration) { Ok(duration) } else { Err("out of range".into()) }
}

fn log_filter(text: &str) -> Result<String, String> {
    env_filter::Builder::new().try_parse(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}
