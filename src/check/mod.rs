//! `baletheus check`, for the user whose device does not show up: the road from the API to the targets once, each target
//! tried as Prometheus would, and what to do where one does not answer.

pub mod probe;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Arg, ArgAction, Command};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::balena::client::Balena;
use crate::balena::device::{one, parse_page};
use crate::balena::failure::Failure;
use crate::balena::query::Query;
use crate::check::probe::{self as scrape, Scraper};
use crate::config::options;
use crate::config::{self, Config};
use crate::discovery::changes::{self as journal, count, warn_of_a_devices_key};
use crate::discovery::inventory::{Answer, Entry, Inventory};
use crate::discovery::target::{Address, JOB, METRICS_PATH, SCHEME};
use crate::discovery::target_file as registry;
use crate::logging::{self, cannot_start, printable};
use crate::net::connector::{Connector, Refused, Tunnel};

/// What is asked of each device beside discovery, which leaves out what changes by itself.
const STATE: &str = "$select=id,uuid,is_online&$expand=belongs_to__application($select=slug)";
/// Devices asked for at once.
const TOP: usize = 1000;
/// Targets tried at once: what hangs must not hold up the rest for long, and the VPN's proxy asks balena's API for each.
const MOST_AT_ONCE: usize = 50;
/// A column is not made wider than this for the sake of one cell.
const WIDEST: usize = 80;

/// A target, or a device without one. `--json` shows it as it is.
#[derive(Debug, Default, Serialize)]
struct Row {
    /// Its name with the beginning of its uuid.
    device: String,
    uuid: Option<String>,
    fleet: Option<String>,
    /// The name of the exporter.
    job: Option<String>,
    /// What is asked for; null if it is left out.
    url: Option<String>,
    /// Whether balenaCloud sees it.
    online: Option<bool>,
    result: Outcome,
    samples: Option<u64>,
    seconds: Option<f64>,
    /// One word for why it is left out or does not answer.
    reason: Option<&'static str>,
    /// The HTTP status that refused, of the VPN's proxy or of the exporter.
    status: Option<u16>,
    /// All of that for people.
    answer: String,
    /// What to do; empty if it answers.
    hint: &'static str,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    #[default]
    LeftOut,
    Answers,
    /// It does not answer, and balenaCloud sees it offline: no failure.
    Offline,
    Fails,
}

/// Its command line: the options of discovery, and the form of what it prints.
pub fn command() -> Command {
    Command::new("check")
        .about("Tries each target as Prometheus would and tells what is the matter: for a device that does not show up")
        .after_help(
            "Exit codes: 0 every target that should answer does, 1 one does not or the API fails, 2 configuration.\n",
        )
        .next_line_help(true)
        .arg(
            Arg::new("json")
                .long("json")
                .action(ArgAction::SetTrue)
                .help("one JSON array of objects instead of a table"),
        )
        .args(options::args())
}

/// Checks, prints, and gives 0 if every target answers that should.
pub fn run(config: Config, json: bool) -> ExitCode {
    logging::init(&config.log);
    let vpn = config.rules.address == Address::Vpn;
    for warning in config.warnings.iter().chain(&config::unencrypted(&config.tunnel).filter(|_| vpn)) {
        log::warn!("{warning}");
    }
    let connector = Connector::new(config.api.roots.clone()).map_err(|error| format!("TLS: {error}"));
    let tunnel = config.tunnel.as_str().parse().map_err(|_| "the tunnel's URL has no use".to_owned());
    let (key, key_file) = (config.api.key.clone(), config.api.key_file.clone());
    let query = Query::new(&config.fleets, &config.rules);
    let balena = Balena::new(config.api, query);
    let (mut balena, connector, tunnel) = match (balena, connector, tunnel) {
        (Ok(balena), Ok(connector), Ok(tunnel)) => (balena, connector, tunnel),
        (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => return cannot_start(&error),
    };
    warn_of_a_devices_key(&mut balena);
    let mut list = Inventory::default();
    let asked = list.refresh(&mut balena, &config.rules).and_then(|()| states(&mut balena));
    let rows = asked.and_then(|states| rows(&list, &states));
    let mut rows = match rows {
        Ok(rows) => rows,
        Err(failure) => {
            log::error!("cannot check: {}", failure.message);
            return ExitCode::FAILURE;
        }
    };
    for warning in journal::warnings(&list, &config.fleets) {
        log::warn!("{warning}");
    }
    let tunnel = vpn.then(|| Tunnel::new(connector.clone(), tunnel, key, key_file));
    if let Err(error) = try_all(&mut rows, Scraper { connector, tunnel }) {
        return cannot_start(&error.to_string());
    }
    let text = if json { self::json(&rows) } else { table(&rows) };
    let mut out = io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        log::error!("cannot write to standard output: {error}");
        return ExitCode::FAILURE;
    }
    if rows.iter().any(|row| row.result == Outcome::Fails) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// What balenaCloud tells of a device beside discovery.
#[derive(Default)]
struct State {
    uuid: Option<String>,
    fleet: Option<String>,
    online: Option<bool>,
}

fn states(balena: &mut Balena) -> Result<BTreeMap<u64, State>, Failure> {
    let (mut states, mut after) = (BTreeMap::new(), 0);
    loop {
        let Answer::Devices(_, body) = balena.ask(STATE, after, TOP, None)? else {
            return Err(Failure::new("bad_answer", "the API's answer is too large"));
        };
        let devices = parse_page(&body)
            .map_err(|error| Failure::new("bad_answer", format!("the API's answer is no page of devices: {error}")))?;
        let end = devices.iter().filter_map(|device| device.id).max();
        for device in &devices {
            let fleet = one(&device.fleet).and_then(|fleet| fleet.slug.as_deref()).map(str::to_owned);
            let state = State { uuid: device.uuid().map(str::to_owned), fleet, online: device.is_online };
            states.insert(device.id.unwrap_or_default(), state);
        }
        match end.filter(|end| devices.len() >= TOP && *end > after) {
            Some(end) => after = end,
            None => return Ok(states),
        }
    }
}

/// A target group, as Prometheus reads it.
#[derive(Deserialize)]
struct Group {
    targets: [String; 1],
    labels: BTreeMap<String, String>,
}

impl Group {
    fn url(&self) -> String {
        let label = |name, default| self.labels.get(name).map_or(default, String::as_str);
        format!("{}://{}{}", label(SCHEME, "http"), self.targets[0], label(METRICS_PATH, "/metrics"))
    }
}

/// A row for each target, and for each device that is left out; none has been tried yet.
fn rows(list: &Inventory, states: &BTreeMap<u64, State>) -> Result<Vec<Row>, Failure> {
    let text = registry::parts(list.texts()).collect::<Vec<_>>().concat();
    let groups: Vec<Group> = serde_json::from_slice(&text).map_err(|error| Failure::new("bad_list", error))?;
    let (mut groups, unknown) = (groups.into_iter(), State::default());
    let mut rows = Vec::new();
    for entry in list.entries() {
        let row = |entry: &Entry| {
            let State { uuid, fleet, online } = states.get(&entry.id).unwrap_or(&unknown);
            let device = entry.name.to_string();
            Row { device, uuid: uuid.clone(), fleet: fleet.clone(), online: *online, ..Row::default() }
        };
        if let Some(left_out) = &entry.left_out {
            let (reason, answer) = (Some(left_out.reason), format!("left out: {}", left_out.why));
            rows.push(Row { reason, answer, hint: hint(left_out.reason), ..row(entry) });
        }
        rows.extend(groups.by_ref().take(entry.targets).map(|group| Row {
            job: group.labels.get(JOB).cloned(),
            url: Some(group.url()),
            ..row(entry)
        }));
    }
    Ok(rows)
}

/// Tries the targets of all rows, many at once; on a terminal it shows how far it is.
fn try_all(rows: &mut [Row], scraper: Scraper) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let urls: Vec<_> = rows.iter().enumerate().filter_map(|(index, row)| Some((index, row.url.clone()?))).collect();
    let (all, mut done, mut waiting, scraper) = (urls.len(), 0, urls.into_iter(), Arc::new(scraper));
    let terminal = io::stderr().is_terminal();
    runtime.block_on(async {
        let mut tries = JoinSet::new();
        loop {
            for (index, url) in waiting.by_ref().take(MOST_AT_ONCE - tries.len()) {
                let scraper = scraper.clone();
                tries.spawn(async move { (index, scraper.scrape(&url).await) });
            }
            let Some(ended) = tries.join_next().await else { break };
            if let Ok((index, answer)) = ended {
                rows[index].answered(answer);
            }
            done += 1;
            if terminal {
                eprint!("\r\x1b[2K{done} of {all} targets tried");
            }
        }
    });
    if terminal {
        eprint!("\r\x1b[2K");
    }
    // a look-up of a name may hang on in a thread of its own
    runtime.shutdown_background();
    Ok(())
}

impl Row {
    fn answered(&mut self, answer: Result<scrape::Answer, Refused>) {
        match answer {
            Ok(answer) => {
                let seconds = answer.took.as_secs_f64();
                self.result = Outcome::Answers;
                (self.samples, self.seconds) = (Some(answer.samples), Some(seconds));
                let s = if answer.samples == 1 { "" } else { "s" };
                self.answer = format!("{} sample{s} in {seconds:.2} s", thousands(answer.samples));
            }
            Err(refused) => {
                let offline = self.online == Some(false);
                self.result = if offline { Outcome::Offline } else { Outcome::Fails };
                (self.reason, self.status) = (Some(refused.reason), refused.status);
                // an HTTP answer shows its status itself
                let status = refused.status.filter(|_| refused.reason != "http");
                self.answer = refused.message + &status.map_or_else(String::new, |status| format!(" ({status})"));
                self.hint = hint(if offline { "offline" } else { refused.reason });
            }
        }
    }
}

/// What to do.
fn hint(reason: &str) -> &'static str {
    match reason {
        // left out
        "broken" | "no_id" | "bad_uuid" => "the API's record of it is odd: please report it",
        "not_tagged" => "change its tag, or --tag (DEVICE_TAG)",
        "switched_off" => "remove the tag, or set it to true",
        "no_public_url" => "switch on its public device URL in balenaCloud's dashboard, or use --address vpn",
        "no_lan_address" => "does its supervisor run? --address vpn needs no address",
        // both
        "offline" => "it is offline, which is no failure here: is it switched on, and on the net?",
        // balena's VPN
        "no_tunnel" | "bad_tunnel" => "is --tunnel-url (TUNNEL_URL) right, and may this machine reach it?",
        "no_access" => "try again in a minute; then see whether the key may reach this device",
        "not_connected" => "restart it, or wait: it has lost balena's VPN",
        "port_closed" | "refused" => {
            "does the exporter run, on this port (--exporter), with host network or the port published?"
        }
        "no_device" => "is --tunnel-url (TUNNEL_URL) the proxy of this balena?",
        // any way
        "no_such_host" => "is --public-domain (PUBLIC_URL_DOMAIN) right, and DNS here?",
        "no_route" => "is this machine in the device's network? --address vpn works from anywhere",
        "timeout" => "is the device alive? does its exporter hang, or a firewall stand between?",
        "tls" => "is the clock here right? does it need --ca-file (BALENA_CA_FILE)?",
        "proxy" => "does the proxy allow it? NO_PROXY goes around it",
        "http" | "not_metrics" => "is the path right (--exporter NAME:PORT/PATH), and what listens there the exporter?",
        "not_http" => "does it want https (tag prometheus.io/scheme)? is it the exporter's port?",
        _ => "the exporter's own log may tell more",
    }
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let comma = |index: usize| if index > 0 && (digits.len() - index).is_multiple_of(3) { "," } else { "" };
    digits.chars().enumerate().fold(String::new(), |text, (index, digit)| format!("{text}{}{digit}", comma(index)))
}

/// One object a line.
fn json(rows: &[Row]) -> String {
    let lines: Vec<_> = rows.iter().filter_map(|row| serde_json::to_string(row).ok()).collect();
    format!("[{}\n]\n", lines.iter().map(|line| format!("\n{line}")).collect::<Vec<_>>().join(","))
}

fn table(rows: &[Row]) -> String {
    let state = |online| match online {
        Some(true) => "online",
        Some(false) => "offline",
        None => "unknown",
    };
    let lines: Vec<[String; 6]> = rows
        .iter()
        .map(|row| {
            let shown = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), printable);
            // as short as it can be without leaving something open
            let url = shown(&row.url);
            let url = url.strip_prefix("http://").unwrap_or(&url);
            let url = url.strip_suffix("/metrics").filter(|host| !host.contains('/')).unwrap_or(url);
            let [device, answer] = [&row.device, &row.answer].map(|text| printable(text));
            [device, shown(&row.fleet), url.to_owned(), state(row.online).into(), answer, row.hint.into()]
        })
        .collect();
    let heads = ["DEVICE", "FLEET", "ADDRESS", "STATE", "ANSWER", "WHAT TO DO"].map(str::to_owned);
    let width = |column: usize| {
        let cells = lines.iter().chain([&heads]).map(|line| line[column].chars().count());
        cells.filter(|width| *width <= WIDEST).max().unwrap_or_default()
    };
    let widths: [usize; 5] = std::array::from_fn(width);
    let mut text = String::new();
    for line in [&heads].into_iter().chain(&lines) {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}  "));
        let _ = writeln!(text, "{}", (cells.collect::<String>() + &line[5]).trim_end());
    }
    let of = |outcome| rows.iter().filter(|row| row.result == outcome).count();
    let [left_out, answer, offline, fail] =
        [Outcome::LeftOut, Outcome::Answers, Outcome::Offline, Outcome::Fails].map(of);
    let targets = count(answer + offline + fail, "target");
    let left_out = count(left_out, "device");
    let _ = writeln!(text, "\n{targets}: {answer} answer, {fail} fail, {offline} offline; {left_out} left out");
    text
}
