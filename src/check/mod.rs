//! `baletheus check`, for a device that does not show up: one refresh, then each target is tried as Prometheus would, and
//! the report says what to do where one does not answer.

mod probe;
mod report;

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Arg, ArgAction, Command};
use hyper::Uri;
use serde::Deserialize;
use tokio::task::JoinSet;

use crate::balena::client::Balena;
use crate::balena::device::{one, parse_page};
use crate::balena::failure::Failure;
use crate::balena::query::Query;
use crate::check::probe::Prober;
use crate::check::report::Row;
use crate::config::options;
use crate::config::{self, Config};
use crate::discovery::changes::{self, warn_of_a_devices_key};
use crate::discovery::inventory::{Answer, Entry, Inventory};
use crate::discovery::target::{Address, JOB, METRICS_PATH, SCHEME};
use crate::discovery::target_file;
use crate::logging::{self, cannot_start};
use crate::net::connector::Connector;
use crate::net::vpn::{KeySource, Vpn};

/// The fields that discovery does not ask for, since they change all the time.
const STATE_QUERY: &str = "$select=id,uuid,is_online&$expand=belongs_to__application($select=slug)";
/// Devices in one request.
const PAGE_SIZE: usize = 1000;
/// Targets tried at once: many, so that those that hang do not hold up the rest, and few, since balena's VPN proxy sends
/// a request to the API for each.
const MAX_PROBES: usize = 50;

/// The command line: the options of discovery, and the format of the report.
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

/// Checks and prints the report. The exit code is 0 if every target answers that should.
pub fn run(config: Config, json: bool) -> ExitCode {
    logging::init(&config.log);
    let vpn = config.rules.address == Address::Vpn;
    for warning in config.warnings.iter().chain(&config::unencrypted(&config.tunnel).filter(|_| vpn)) {
        log::warn!("{warning}");
    }
    let (rules, fleets) = (config.rules.clone(), config.fleets.clone());
    let (mut balena, prober) = match start(config) {
        Ok(started) => started,
        Err(error) => return cannot_start(&error),
    };
    warn_of_a_devices_key(&mut balena);
    let mut list = Inventory::default();
    let asked = list.refresh(&mut balena, &rules).and_then(|()| states(&mut balena));
    let mut rows = match asked.and_then(|states| rows(&list, &states)) {
        Ok(rows) => rows,
        Err(failure) => {
            log::error!("cannot check: {}", failure.message);
            return ExitCode::FAILURE;
        }
    };
    for warning in changes::warnings(&list, &fleets) {
        log::warn!("{warning}");
    }
    if let Err(error) = probe_all(&mut rows, prober) {
        return cannot_start(&error.to_string());
    }
    let text = if json { report::json(&rows) } else { report::table(&rows) };
    let mut out = io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        log::error!("cannot write to standard output: {error}");
        return ExitCode::FAILURE;
    }
    if rows.iter().any(Row::fails) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn start(config: Config) -> Result<(Balena, Prober), String> {
    let connector = Connector::new(config.api.roots.clone(), config.api.proxies.clone())
        .map_err(|error| format!("TLS: {error}"))?;
    let public = Uri::builder().scheme("https").authority(&*config.rules.public_domain).path_and_query("/").build();
    if config.rules.address == Address::Public
        && let Some(proxy) = public.ok().as_ref().and_then(|url| connector.proxy_for(url))
    {
        log::warn!(
            "targets are tried through the proxy {proxy}; Prometheus takes it from the environment only with \
             proxy_from_environment: true in the scrape config"
        );
    }
    let vpn = if config.rules.address == Address::Vpn {
        let url = config.tunnel.as_str().parse().map_err(|_| "TUNNEL_URL is invalid")?;
        let keys = KeySource::new(config.api.key.clone(), config.api.key_file.clone());
        Some(Vpn::new(connector.clone(), url, keys))
    } else {
        None
    };
    let balena = Balena::new(config.api, Query::new(&config.fleets, &config.rules))?;
    Ok((balena, Prober { connector, vpn }))
}

/// What balenaCloud knows about a device, beside what discovery asks for.
#[derive(Default)]
struct State {
    uuid: Option<String>,
    fleet: Option<String>,
    online: Option<bool>,
}

fn states(balena: &mut Balena) -> Result<BTreeMap<u64, State>, Failure> {
    let (mut states, mut after) = (BTreeMap::new(), 0);
    loop {
        let Answer::Devices(_, body) = balena.ask(STATE_QUERY, after, PAGE_SIZE, None)? else {
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
        match end.filter(|end| devices.len() >= PAGE_SIZE && *end > after) {
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

/// A row for each target, and for each device that is left out. No target has been tried yet.
fn rows(list: &Inventory, states: &BTreeMap<u64, State>) -> Result<Vec<Row>, Failure> {
    let text = target_file::parts(list.texts()).collect::<Vec<_>>().concat();
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
            rows.push(row(entry).left_out(left_out));
        }
        rows.extend(groups.by_ref().take(entry.targets).map(|group| Row {
            job: group.labels.get(JOB).cloned(),
            url: Some(group.url()),
            ..row(entry)
        }));
    }
    Ok(rows)
}

/// Tries the targets of all rows. On a terminal it shows the progress.
fn probe_all(rows: &mut [Row], prober: Prober) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let urls: Vec<_> = rows.iter().enumerate().filter_map(|(index, row)| Some((index, row.url.clone()?))).collect();
    let (all, mut done, mut waiting, prober) = (urls.len(), 0, urls.into_iter(), Arc::new(prober));
    let terminal = io::stderr().is_terminal();
    runtime.block_on(async {
        let mut running = JoinSet::new();
        loop {
            for (index, url) in waiting.by_ref().take(MAX_PROBES - running.len()) {
                let prober = prober.clone();
                running.spawn(async move { (index, prober.probe(&url).await) });
            }
            let Some(ended) = running.join_next().await else { break };
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
    // the look-up of a name may hang on a thread of the runtime
    runtime.shutdown_background();
    Ok(())
}
