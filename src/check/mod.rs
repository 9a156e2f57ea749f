//! `baletheus check`, for a device that does not show up: one refresh, then each target is tried as Prometheus would, and
//! the report says what to do where one does not answer.

mod anonymous;
pub mod hints;
mod probe;
mod report;

use std::io::{self, IsTerminal, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::Uri;
use log::LevelFilter;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::balena::{Api, Client, Query, Selection};
use crate::check::probe::{Prober, SCRAPE_TIMEOUT};
use crate::check::report::{Row, Stopped};
use crate::device_state::listed_devices::{FleetState, ListedDevice, ListedDevices};
use crate::device_state::polling;
use crate::device_state::services::NotRunning;
use crate::discovery::changes;
use crate::discovery::entry::Entry;
use crate::discovery::exporter::Exporter;
use crate::discovery::inventory::Inventory;
use crate::discovery::key_warnings::KeyOwner;
use crate::discovery::target::{Address, Rules};
use crate::key_renewal::KeySource;
use crate::logging;
use crate::net::{CannotStart, Connector, Vpn};
use crate::text::count;

/// Targets tried at once: many, so that those that hang do not hold up the rest, and few, since balena's VPN proxy sends
/// a request to the API for each.
const MAX_PROBES: usize = 50;

pub struct Settings {
    pub api: Api,
    pub selection: Selection,
    pub rules: Rules,
    /// balena's VPN proxy.
    pub tunnel: Uri,
    /// Only devices with this in their name, or at the start of their uuid.
    pub name: Option<String>,
    /// Only what fails is shown.
    pub failing: bool,
    pub form: Form,
    pub log: logging::Settings,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Table,
    Json,
    /// For an issue, without names, uuids and keys.
    Anonymous,
}

/// Checks and prints the report. Returns whether there is a device, and every target answers that should; the log says why there
/// is no report. `stop` ends it while it tries targets: the report has what is known by then.
pub fn run(mut settings: Settings, stop: Arc<Notify>) -> Result<bool, CannotStart> {
    if settings.form == Form::Anonymous {
        // Warnings name devices, and a terminal is copied whole.
        settings.log = logging::Settings { level: LevelFilter::Error, filter: None, ..settings.log };
    }
    logging::init(&settings.log, &settings.api.key);
    let form = settings.form;
    let options = anonymous::options(&settings);
    let (mut client, prober) = connect(&settings)?;
    let start = Instant::now();
    let mut list = Inventory::default();
    let refreshed = list.refresh(&mut client, &settings.rules);
    KeyOwner::default().check(&mut client, &refreshed, list.entries().count(), &|| start.elapsed());
    let refresh = start.elapsed();
    match refreshed {
        Err(failure) if form == Form::Anonymous => {
            log::error!("cannot check; without --report the message says more");
            print(&anonymous::failed(&options, &failure), &settings.api.key);
            return Ok(false);
        }
        Err(failure) => {
            log::error!("cannot check: {failure}");
            return Ok(false);
        }
        Ok(()) => {}
    }
    let known = if form == Form::Json { services(&client) } else { FleetState::default() };
    let mut rows = all_rows(&list, known, settings.name.as_deref());
    if let Some(name) = settings.name.as_ref().filter(|_| rows.is_empty()) {
        let devices = count(list.entries().count(), "device");
        let name = if form == Form::Anonymous { "this".to_owned() } else { format!("{name:?}") };
        log::error!("no device has {name} in its name or at the start of its uuid; the API lists {devices}");
        return Ok(false);
    }
    for warning in changes::warnings(&list, &settings.selection.fleets) {
        log::warn!("{warning}");
    }
    probe_all(&mut rows, prober, stop)?;
    let all = rows.len();
    rows.retain(Row::is_known);
    let untried = all - rows.len();
    if untried > 0 {
        log::error!("stopped: {} not tried", count(untried, "target"));
    }
    // Without a device, there is nothing that could answer.
    let succeeds = all > 0 && untried == 0 && !rows.iter().any(Row::fails);
    let shown = rows.iter().filter(|row| !settings.failing || row.fails());
    let text = match form {
        Form::Json => report::json(shown),
        Form::Anonymous => anonymous::report(&options, refresh, &rows),
        Form::Table => {
            let (first, then): (Vec<_>, Vec<_>) = shown.partition(|row| row.fails());
            report::table(first.into_iter().chain(then), &rows, width())
        }
    };
    Ok(print(&text, &settings.api.key) && succeeds)
}

/// The rows of the devices with this name, or of all.
fn all_rows(list: &Inventory, known: FleetState, name: Option<&str>) -> Vec<Row> {
    let mut devices = ListedDevices::new(list.pages().clone(), known);
    let mut rows = Vec::new();
    while let Some(device) = devices.next() {
        if name.is_none_or(|name| is_named(device.entry, name)) {
            rows.extend(self::rows(&device));
        }
    }
    rows
}

/// Whether a device has this in its name, or at the start of its uuid, or is shown as this: `gw-0001 (cea099a)`.
fn is_named(entry: &Entry, name: &str) -> bool {
    let (name, shown) = (name.to_lowercase(), entry.shown().to_lowercase());
    let Some(uuid) = entry.uuid() else { return shown.contains(&name) };
    entry.device_name().to_lowercase().contains(&name) || uuid.starts_with(&name) || shown == name
}

/// The width of the terminal, as the shell sets it or as the system knows it.
fn width() -> Option<usize> {
    let set = || std::env::var("COLUMNS").ok()?.parse().ok();
    terminal_size::terminal_size_of(io::stdout()).map(|(width, _)| width.0.into()).or_else(set)
}

/// Whether the text could be written to standard output. It does not show the key, which an exporter's answer may hold.
fn print(text: &str, key: &KeySource) -> bool {
    let mut out = io::stdout().lock();
    let written = out.write_all(key.hidden_in(text).as_bytes()).and_then(|()| out.flush());
    written.map_err(|error| log::error!("cannot write to standard output: {error}")).is_ok()
}

fn connect(settings: &Settings) -> Result<(Client, Prober), CannotStart> {
    let connector = Connector::new(settings.api.roots.clone(), settings.api.proxies.clone())?;
    let public = Uri::builder().scheme("https").authority(&*settings.rules.public_domain).path_and_query("/").build();
    if settings.rules.address == Address::Public
        && let Some(proxy) = public.ok().as_ref().and_then(|url| connector.proxy_for(url))
    {
        log::warn!(
            "targets are tried through the proxy {proxy}; Prometheus takes it from the environment only with \
             proxy_from_environment: true in the scrape config"
        );
    }
    let vpn = if settings.rules.address == Address::Vpn {
        Some(Vpn::new(connector.clone(), settings.tunnel.clone(), settings.api.key.clone()))
    } else {
        None
    };
    // Discovery leaves this field out where it does not need it, since it changes all the time.
    let is_asked_for = settings.rules.fields().any(|field| field == "is_connected_to_vpn");
    let online = (!is_asked_for).then_some("is_connected_to_vpn");
    let query = Query::new(settings.rules.fields().chain(online), &settings.selection);
    Ok((
        Client::new(settings.api.clone(), query)?,
        Prober { connector, vpn, is_lan: settings.rules.address == Address::Lan },
    ))
}

/// What runs on the devices; nothing where the API does not say it, which the log has.
fn services(client: &Client) -> FleetState {
    polling::once(client).unwrap_or_else(|failure| {
        log::warn!("cannot read the services of the devices: {failure}");
        FleetState::default()
    })
}

/// A row for each target of a device, or for the device if it is left out. No target has been tried yet.
fn rows(device: &ListedDevice) -> Vec<Row> {
    let entry = device.entry;
    let services = device.services.as_ref().filter(|services| services.are_reported());
    let stopped = |install: &NotRunning| Stopped {
        service: install.service.as_deref().map(str::to_owned),
        status: install.status.to_string(),
    };
    let row = || Row {
        services_not_running: services.map(|services| services.of_running_release().map(stopped).collect()),
        device: entry.shown().into_owned(),
        uuid: entry.uuid().map(str::to_owned),
        fleet: entry.common.fleet.as_ref().map(|fleet| fleet.slug.clone()),
        online: entry.online,
        ..Row::default()
    };
    if let Some(left_out) = &entry.left_out {
        return vec![row().left_out(left_out)];
    }
    let host = entry.host();
    let rows = entry.targets().iter().map(|target| Row {
        job: target.exporter.name.clone(),
        service: target.exporter.service.clone(),
        origin: Some(entry.common.origin.as_str()),
        url: Some(url(&host, &target.exporter)),
        timeout: target.exporter.timeout.as_ref().map_or(SCRAPE_TIMEOUT, |(_, millis)| Duration::from_millis(*millis)),
        ..row()
    });
    rows.collect()
}

fn url(host: &str, exporter: &Exporter) -> String {
    let (scheme, port) = (exporter.scheme.unwrap_or("http"), exporter.port);
    format!("{scheme}://{host}:{port}{}", exporter.path.as_deref().unwrap_or("/metrics"))
}

/// Tries the targets of all rows, until `stop`. On a terminal it shows the progress.
fn probe_all(rows: &mut [Row], prober: Prober, stop: Arc<Notify>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let urls: Vec<_> =
        rows.iter().enumerate().filter_map(|(index, row)| Some((index, row.url.clone()?, row.timeout))).collect();
    let all = urls.len();
    let mut waiting = urls.into_iter();
    let prober = Arc::new(prober);
    let terminal = io::stderr().is_terminal();
    runtime.block_on(async {
        let mut running = JoinSet::new();
        running.spawn(async move {
            stop.notified().await;
            None
        });
        for done in 0..all {
            for (index, url, timeout) in waiting.by_ref().take(MAX_PROBES + 1 - running.len()) {
                let prober = prober.clone();
                running.spawn(async move { Some((index, prober.probe(&url, timeout).await)) });
            }
            match running.join_next().await {
                Some(Ok(Some((index, answer)))) => rows[index].answered(answer),
                Some(Ok(None)) | None => break,
                Some(Err(_)) => {} // it stays untried
            }
            if terminal {
                let _ = write!(io::stderr(), "\r\x1b[2K{} of {all} targets tried", done + 1); // nobody may read it
            }
        }
    });
    if terminal {
        let _ = write!(io::stderr(), "\r\x1b[2K"); // nobody may read it
    }
    // the look-up of a name may hang on a thread of the runtime
    runtime.shutdown_background();
    Ok(())
}
