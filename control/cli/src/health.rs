//! `health`: what is wrong, one sentence for each, and an exit status for programs that watch.

use std::path::Path;

use everdisk_api::{
    client::{ClientError, ask},
    request::Request,
    status::{Health, VolumeStatus},
};
use everdisk_proto::ids::VolumeName;
use serde_json::json;

use crate::{
    failure::Failure,
    output::{self, complain},
};

/// Prints the health of one volume, or of all volumes.
///
/// # Errors
/// [`Failure::Unwell`] when something is wrong, [`Failure::Client`] when there is no such volume.
pub(crate) fn health(socket: &Path, as_json: bool, name: Option<VolumeName>) -> Result<(), Failure> {
    let volumes = match volumes(socket, name) {
        // Without an answer the volumes are not known to be well.
        Err(error @ (ClientError::Refused(_) | ClientError::Strange(_))) => return Err(error.into()),
        Err(error) => {
            complain(&format!("everdisk: {error}"));
            return Err(Failure::Unwell(Health::Failed));
        }
        Ok(volumes) => volumes,
    };
    for volume in &volumes {
        let VolumeStatus { name, health, problems, state, .. } = volume;
        if as_json {
            output::json(&json!({ "name": name, "health": health, "state": state, "problems": problems }));
        } else if *health == Health::Ok {
            output::line(&format!("{name} is well ({})", state.name()));
        } else {
            problems.iter().for_each(|problem| output::line(&format!("{name} is {}: {problem}", health.name())));
        }
    }
    match volumes.iter().map(|volume| volume.health).max().unwrap_or_default() {
        Health::Ok => Ok(()),
        health => Err(Failure::Unwell(health)),
    }
}

/// The volumes that are asked for.
pub(crate) fn volumes(socket: &Path, name: Option<VolumeName>) -> Result<Vec<VolumeStatus>, ClientError> {
    let is_one = name.is_some();
    let value = ask(socket, &Request::Status { name }, |_| {})?;
    let volumes =
        if is_one { serde_json::from_value(value).map(|one| vec![one]) } else { serde_json::from_value(value) };
    volumes.map_err(ClientError::Strange)
}
