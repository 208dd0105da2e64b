// What an engine throws where the page can help.

export class KeyNeeded extends Error {}
