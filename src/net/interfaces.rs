//! The addresses of this machine.

use ipnet::IpNet;

/// Each address of this machine, with its network.
///
/// # Errors
/// The system does not list them. The text is for the user.
pub fn addresses() -> Result<Vec<IpNet>, String> {
    let interfaces = if_addrs::get_if_addrs();
    let interfaces = interfaces.map_err(|error| format!("cannot read the addresses of this machine: {error}"))?;
    let network = |interface: &if_addrs::Interface| {
        let prefix = match &interface.addr {
            if_addrs::IfAddr::V4(address) => address.prefixlen,
            if_addrs::IfAddr::V6(address) => address.prefixlen,
        };
        IpNet::new(interface.ip(), prefix).ok()
    };
    Ok(interfaces.iter().filter_map(network).collect())
}
