// Errors of an engine that the page can handle.

export class KeyNeeded extends Error {}
